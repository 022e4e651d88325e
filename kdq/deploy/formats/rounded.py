"""A model whose layers multiply floats that are rounded to codes.

That is what the converters for LiteRT and TensorRT read: a pair of a quantize and a dequantize
operation says what an input or a weight is rounded to, and they make an integer operator of the
pairs and of what is between.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from kdq.deploy import contraction
from kdq.deploy.contraction import Conv, Dot, Kernel
from kdq.deploy.flow import network
from kdq.deploy.integer_layer import IntegerLayer
from kdq.deploy.lower.lowering import IntegerModel
from kdq.deploy.qtensor import InputGrid
from kdq.types import Array


class Rounding:
    """How a format writes what is rounded."""

    def input(self, x: Array, grid: InputGrid, of_two: bool) -> Array:
        """An input of a layer on its grid; `of_two`: of a product of two inputs."""
        raise NotImplementedError

    def apart(self, x: Array) -> Array:
        """An input that is also used otherwise, or is not made by a layer, before it is rounded."""
        return x

    def bind(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> Any:
        """An equation between layers."""
        return contraction.bind(eqn, values)

    def weight(self, codes: np.ndarray, scale: np.ndarray, axis: int, bits: int) -> Array:
        """A weight of these codes, with a scale for each channel along an axis.

        Args:
          codes: its codes around 0.
          scale: [channels] float32.
          axis: of the channels.
          bits: 4, if its codes have no more, or 8.
        """
        raise NotImplementedError

    def convolve(
        self, kernel: Conv, x: Array, codes: np.ndarray, scale: np.ndarray, bits: int
    ) -> Array:
        """A convolution with a weight, see `weight`, in the layout that it has."""
        axis = kernel.dimension_numbers.rhs_spec[0]
        return self.product(kernel, x, self.weight(codes, scale, axis, bits))

    def product(self, kernel: Kernel, x: Array, w: Array) -> Array:
        """A product of floats."""
        return product(kernel, x, w)


def forward(lowered: IntegerModel, rounding: Rounding) -> Callable[..., Array]:
    """The model as a function of its inputs, to be traced; layers of a stack are unrolled."""

    def binder(program: core.Jaxpr) -> Callable[..., Any]:
        alone = {*network.codes_alone(program), *program.invars}

        def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> Any:
            if eqn.primitive is not network.layer_p:
                return rounding.bind(eqn, values)
            count = len(eqn.params["call"].operands)
            inputs = [
                x if isinstance(atom, core.Literal) or atom in alone else rounding.apart(x)
                for x, atom in zip(values[:count], eqn.invars, strict=False)
            ]
            return _layer(eqn, [*inputs, *values[count:]], rounding)

        return bind

    return lambda *arrays: lowered.evaluate(arrays, binder)


def _layer(eqn: core.JaxprEqn, values: Sequence[Any], rounding: Rounding) -> Array:
    """A layer between floats."""
    call = eqn.params["call"]
    inputs, layer = network.split(values, call)
    given = {
        role: rounding.input(x, layer.inputs[name], layer.weight is None)
        for role, x, name in zip(
            (contraction.INPUT, contraction.OTHER), inputs, call.operands, strict=False
        )
    }
    if layer.weight is not None:
        given[contraction.WEIGHT] = layer.weight.codes
    operands = [(role, given.get(role)) for role in call.roles]
    result = contraction.follow(call.traced, operands, _Floats(layer, rounding), {})[1]
    return result.astype(eqn.outvars[0].aval.dtype)


class _Floats(contraction.Steps):
    """A layer on the floats that its codes stand for."""

    def __init__(self, layer: IntegerLayer, rounding: Rounding):
        self.layer, self.rounding = layer, rounding

    def multiply(self, kernel: Kernel, left: Array, right: Array) -> Array:
        layer = self.layer
        if layer.weight is None:
            total = self.rounding.product(kernel, left, right)
        elif layer.weight_zero is not None:
            raise ValueError("it has weights around 0 only, and a layer's have a zero point")
        else:
            bits = 4 if layer.weight.codes.dtype in (jnp.int2, jnp.int4) else 8
            by_weight = self._convolve if isinstance(kernel, Conv) else self._matrix
            scale = np.asarray(layer.weight_scale, np.float32)
            total = by_weight(kernel, left, np.asarray(right), scale, bits)
        if layer.bias is None:
            return total
        with jax.ensure_compile_time_eval():
            bias = layer.bias.astype(jnp.float32) * layer.scale
        return total + bias

    def add_bias(self, result: Any, bias: Any) -> Any:
        return result  # it is in the sum already

    def _convolve(
        self, kernel: Conv, x: Array, codes: np.ndarray, scale: np.ndarray, bits: int
    ) -> Array:
        channels = codes.shape[kernel.dimension_numbers.rhs_spec[0]]
        scale = np.broadcast_to(scale.ravel(), channels)
        return self.rounding.convolve(kernel, x, codes, scale, bits)

    def _matrix(
        self, kernel: Dot, x: Array, codes: np.ndarray, scale: np.ndarray, bits: int
    ) -> Array:
        """By a weight of one axis of terms and one of channels: a scale has one axis."""
        axes = contraction.axes(kernel, codes.ndim)
        if axes.x_shared:
            raise ValueError("it has no weight for each example")
        height, width = [x.shape[a] for a in axes.x_free], [codes.shape[a] for a in axes.w_free]
        scale = contraction.aligned(scale, len(axes.order)).transpose(axes.back)
        scale = np.broadcast_to(scale, [1] * len(height) + width).ravel()
        codes = codes.transpose([*axes.w_summed, *axes.w_free]).reshape(-1, len(scale))
        x = x.transpose([*axes.x_free, *axes.x_summed]).reshape([*height, len(codes)])
        matrix = self.rounding.weight(codes, scale, 1, bits)
        total = self.rounding.product(Dot((((x.ndim - 1,), (0,)), ((), ())), x.ndim), x, matrix)
        return total.reshape([*height, *width]).transpose(axes.order)


def product(kernel: Kernel, x: Array, w: Array) -> Array:
    """The product of two arrays of floats."""
    if isinstance(kernel, Conv):
        return lax.conv_general_dilated(
            x,
            w,
            kernel.strides,
            kernel.padding,
            kernel.input_dilation,
            kernel.kernel_dilation,
            kernel.dimension_numbers,
            feature_group_count=kernel.groups,
        )
    left, right = (w, x) if kernel.swapped else (x, w)
    return lax.dot_general(left, right, kernel.dimension_numbers)
