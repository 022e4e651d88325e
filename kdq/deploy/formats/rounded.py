"""A model whose layers multiply floats that are rounded to codes.

That is what the converters for LiteRT and TensorRT read: a pair of a quantize and a dequantize
operation says what an input or a weight is rounded to, and they make an integer operator of the
pairs and of what is between.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from kdq.deploy import jaxprs
from kdq.deploy.contraction import Conv, Dot, Kernel, align, follow, list_axes
from kdq.deploy.flow.layer import inline, layer_p
from kdq.deploy.flow.propagate import assign_grids
from kdq.deploy.lower.model import IntegerModel
from kdq.deploy.qtensor import InputGrid
from kdq.quantize.inputs import Inputs
from kdq.types import Array


class ChannelWeight(NamedTuple):
    """A weight as codes around 0, with a scale for each channel."""

    codes: np.ndarray
    scale: np.ndarray  # [channels] float32
    axis: int  # of the channels
    bits: int  # 4, if the codes have no more, or 8


class Rounding:
    """The operations of a format that rounds. Arrays are floats."""

    def input(self, x: Array, grid: InputGrid, of_two: bool) -> Array:
        """Rounds an input of a layer to its grid; `of_two`: of a product of two inputs."""
        raise NotImplementedError

    def weight(self, weight: ChannelWeight) -> Array:
        """Returns the numbers of a weight."""
        raise NotImplementedError

    def set_apart(self, x: Array) -> Array:
        """Returns an input that is also used otherwise, or is not made by a layer."""
        return x

    def bind(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
        """Runs an equation between layers."""
        return jaxprs.bind(eqn, values)

    def convolve(self, kernel: Conv, x: Array, weight: ChannelWeight) -> Array:
        """Returns a convolution with a weight in the layout that it has."""
        return self.product(kernel, x, self.weight(weight))

    def product(self, kernel: Kernel, x: Array, w: Array) -> Array:
        """Returns a product of floats."""
        if isinstance(kernel, Dot):
            left, right = (w, x) if kernel.swapped else (x, w)
            return lax.dot_general(left, right, kernel.dimension_numbers)
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


def run(lowered: IntegerModel, rounding: Rounding, inputs: Inputs) -> Any:
    """Returns a model's outputs, to be traced; layers of a stack are unrolled."""
    traced, structure, leaves = lowered.trace(inputs)
    program = inline(traced, leaves, unroll=True)
    rounded_alone = {*assign_grids(program.jaxpr), *program.jaxpr.invars}

    def run_equation(eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        if eqn.primitive is not layer_p:
            return rounding.bind(eqn, values)
        for i, atom in enumerate(eqn.invars[: len(eqn.params["call"].operands)]):
            if not isinstance(atom, core.Literal) and atom not in rounded_alone:
                values[i] = rounding.set_apart(values[i])
        return [_run_layer(eqn, values, rounding)]

    return jax.tree.unflatten(structure, jaxprs.evaluate(program, leaves, run_equation))


def _run_layer(eqn: core.JaxprEqn, values: list[Any], rounding: Rounding) -> Array:
    """Runs a layer on the floats that its codes stand for."""
    call = eqn.params["call"]
    inputs, layer = call.split(values)
    rounded = [
        rounding.input(x, layer.inputs[name], layer.weight is None)
        for x, name in zip(inputs, call.operands, strict=True)
    ]

    def multiply(kernel: Kernel, left: Array, right: Array) -> Array:
        if layer.weight is None:
            total = rounding.product(kernel, left, right)
        elif layer.weight_zero is not None:
            raise ValueError("it has weights around 0 only, and a layer's have a zero point")
        else:
            codes, bits = (
                np.asarray(right),
                4 if layer.weight.codes.dtype in (jnp.int2, jnp.int4) else 8,
            )
            scale = np.asarray(layer.weight_scale, np.float32)
            if isinstance(kernel, Conv):
                axis = kernel.dimension_numbers.rhs_spec[0]
                scale = np.broadcast_to(scale.ravel(), codes.shape[axis])
                total = rounding.convolve(kernel, left, ChannelWeight(codes, scale, axis, bits))
            else:
                total = _multiply_matrix(rounding, kernel, left, codes, scale, bits)
        if layer.bias is None:
            return total
        with jax.ensure_compile_time_eval():
            bias = layer.bias.astype(jnp.float32) * layer.scale
        return total + bias

    codes = None if layer.weight is None else layer.weight.codes
    result = follow(call.traced, call.place_operands(rounded, codes), multiply)[1]
    return result.astype(eqn.outvars[0].aval.dtype)


def _multiply_matrix(
    rounding: Rounding, kernel: Dot, x: Array, codes: np.ndarray, scale: np.ndarray, bits: int
) -> Array:
    """Multiplies by a weight of one axis of terms and one of channels: a scale has one axis."""
    axes = list_axes(kernel, codes.ndim)
    if axes.x_shared:
        raise ValueError("it has no weight for each example")
    height, width = [x.shape[a] for a in axes.x_free], [codes.shape[a] for a in axes.w_free]
    # [1 for each of height, *width] -> [channels]
    scale = align(scale, len(axes.order)).transpose(np.argsort(axes.order))
    scale = np.broadcast_to(scale, [1] * len(height) + width).ravel()
    codes = codes.transpose([*axes.w_summed, *axes.w_free]).reshape(-1, len(scale))
    x = x.transpose([*axes.x_free, *axes.x_summed]).reshape([*height, len(codes)])
    matrix = rounding.weight(ChannelWeight(codes, scale, 1, bits))  # [terms, channels]
    total = rounding.product(Dot((((x.ndim - 1,), (0,)), ((), ())), x.ndim), x, matrix)
    return total.reshape([*height, *width]).transpose(axes.order)
