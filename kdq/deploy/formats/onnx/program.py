"""A program on its way to ONNX: equations in place of those that ONNX Runtime is slow at.

The converters beside this file have the operators that its primitives become.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kdq.deploy import arithmetic, jaxprs, primitives
from kdq.deploy.contraction import Conv, Dot
from kdq.deploy.formats.rounded import ChannelWeight, Rounding
from kdq.deploy.qtensor import InputGrid
from kdq.types import Array


class NoForm(ValueError):
    """Something that there is no form for in ONNX; the message says what."""


primitive = primitives.primitive
RESHAPES = ("reshape", "squeeze", "expand_dims")
# jax2onnx computes the shapes of these at every run of the model, if the batch has any size.
reshape_p = primitive("kdq_reshape", lambda x, *, shape: x.reshape(shape))
slice_p = primitive("kdq_slice", jax.lax.slice_p.bind)
# jax2onnx adds a scalar 0 to it, with which ONNX Runtime has no kernel for weights of few bits.
matmul_p = primitive("kdq_matmul", jnp.matmul)
add_p = primitive("kdq_add", jnp.add)  # of a bias without axes of one element
pad_p = primitive("kdq_pad", jax.lax.pad_p.bind)  # jax2onnx pads no batch of any size
remainder_p = primitive("kdq_remainder", jax.lax.rem)  # nor has a remainder of one
# jax2onnx does not pick from the axis of the batch and another one at once.
pick_p = primitive("kdq_pick", jax.lax.gather_p.bind)

# jax2onnx has convolutions of these layouts.
PLAIN = ((0, 1, 2), (0, 2, 1), (0, 1, 2, 3), (0, 3, 1, 2))
PLAIN_KERNELS = ((0, 1, 2), (2, 1, 0), (0, 1, 2, 3), (3, 2, 0, 1))
conv_p = primitive("kdq_conv", jax.lax.conv_general_dilated_p.bind)

REDUCERS = {"max": jax.lax.max, "min": jax.lax.min, "add": jax.lax.add, "mul": jax.lax.mul}
IDENTITIES = {"max": -np.inf, "min": np.inf, "sum": 0}  # of floats, by what JAX calls the window
WINDOW = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")


def _window(x: Array, init: Array, *, reducer: str, **window: Any) -> Array:
    return jax.lax.reduce_window(x, init, REDUCERS[reducer], *[window[name] for name in WINDOW])


# jax2onnx pools over all axes, which ONNX Runtime does not, and floats alone.
window_p = primitive("kdq_window", _window)


def _int8_weight(codes: Array, scale: Array, *, axis: int) -> Array:
    shape = [-1 if a == axis else 1 for a in range(codes.ndim)]
    return codes.astype(jnp.float32) * scale.reshape(shape)


product_to_float = primitives.Operation(
    "kdq_product_to_float",
    lambda x, w, layer, scale, **params: arithmetic.to_float(
        primitives.product(x, w, layer, **params), scale
    ),
)
round_int8_p = primitive(
    "kdq_round_int8",
    lambda x, scale: jnp.clip(jnp.round(arithmetic.divide(x, scale)), -128, 127) * scale,
)
int8_weight_p = primitive("kdq_int8_weight", _int8_weight)


class Symmetric(Rounding):
    """Pairs of QuantizeLinear and DequantizeLinear, of int8 around 0, which TensorRT reads."""

    def input(self, x: Array, grid: InputGrid, of_two: bool) -> Array:
        """See `Rounding.input`. Raises ValueError for codes that int8 around 0 does not hold."""
        scale, zero, top = np.float32(grid.scale), int(grid.zero_point), int(grid.top)
        low, high = -zero, top - zero
        if low < -128 or high > 127:
            raise ValueError(
                f"it has integers from -128 to 127 for inputs, and a layer's go from {low} to "
                f"{high}: calibrate with activations=TensorSpec(bits=8, signed=True)"
            )
        if (low, high) != (-128, 127):
            x = jnp.clip(x, low * scale, high * scale)
        return round_int8_p.bind(x, scale)

    def weight(self, weight: ChannelWeight) -> Array:
        """See `Rounding.weight`."""
        return int8_weight_p.bind(weight.codes.astype(np.int8), weight.scale, axis=weight.axis)

    def convolve(self, kernel: Conv, x: Array, weight: ChannelWeight) -> Array:
        """Convolves with the channels first: nothing is between a weight and its convolution."""
        numbers = kernel.dimension_numbers
        plain = jax.lax.ConvDimensionNumbers(*[tuple(range(x.ndim))] * 3)
        kernel = dataclasses.replace(kernel, dimension_numbers=plain)
        weight = weight._replace(codes=weight.codes.transpose(numbers.rhs_spec), axis=0)
        total = super().convolve(kernel, x.transpose(numbers.lhs_spec), weight)
        return total.transpose(np.argsort(numbers.out_spec))


REPLACED = {  # by the name of the primitive, whatever its parameters are
    "copy": lambda x, **_: x,
    "copy_p": lambda x, **_: x,
    "clamp": lambda low, x, high, **_: jnp.minimum(jnp.maximum(x, low), high),  # for any batch
    "rem": lambda x, by, **_: remainder_p.bind(x, by),
    "pad": pad_p.bind,
}


def evaluate(program: core.ClosedJaxpr, arrays: Sequence[Any]) -> list[Any]:
    """Returns the outputs of a program, by operations that ONNX Runtime is fast at."""
    uses = collections.Counter(
        atom
        for atoms in [*(eqn.invars for eqn in program.jaxpr.eqns), program.jaxpr.outvars]
        for atom in atoms
        if isinstance(atom, core.Var)
    )
    makers = {eqn.outvars[0]: eqn for eqn in program.jaxpr.eqns}
    known = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    # Products whose sums become floats at once, and nothing else: one operation makes the floats.
    products = {}  # by the floats
    for eqn in program.jaxpr.eqns:
        if eqn.primitive is primitives.to_float.primitive and uses[eqn.invars[0]] == 1:
            maker = makers.get(eqn.invars[0])
            if maker is not None and _is_gemm_to_float(maker, known.get(eqn.invars[1]), known):
                products[eqn.outvars[0]] = maker
    joined = {maker.outvars[0] for maker in products.values()}

    def run_equation(eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        if eqn.outvars[0] in joined:
            return [values]  # for the equation that makes floats of it
        if eqn.outvars[0] in products:
            operands, scale = values
            params = dict(products[eqn.outvars[0]].params)
            operands = jax.tree.unflatten(params.pop("structure"), operands)
            return [product_to_float(*operands, scale, **params)]
        outputs = bind(eqn, values)
        return outputs if eqn.primitive.multiple_results else [outputs]

    return jaxprs.evaluate(program, arrays, run_equation)


def _is_gemm_to_float(eqn: core.JaxprEqn, scale: Any, known: Mapping[core.Var, Any]) -> bool:
    """Returns whether an equation multiplies rows and a matrix, whose sums have this scale."""
    if eqn.primitive is not primitives.product.primitive or scale is None:
        return False
    _, _, layer = primitives.arguments(eqn)
    kernel = eqn.params["kernel"]
    if not isinstance(kernel, Dot) or kernel.dimension_numbers[1][0] or "other" in layer.inputs:
        return False
    factors = [known.get(atom) for atom in (layer.inputs["activations"].scale, layer.weight_scale)]
    more = (layer.output, layer.weight_zero)
    if any(part is not None for part in more) or any(factor is None for factor in factors):
        return False
    product = np.float32(factors[0]) * np.float32(factors[1])
    return np.shape(product) == np.shape(scale) and bool((product == np.asarray(scale)).all())


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> Any:
    """Runs an equation, by an operation that jax2onnx writes better if there is one.

    Returns its output, or a list of them as the primitive does.
    """
    name, params, shape = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
    if name in REPLACED:
        return REPLACED[name](*values, **params)
    if name.startswith("reduce_window"):
        return _bind_window(eqn, values)
    if name == "concatenate" and any(0 in atom.aval.shape for atom in eqn.invars):
        # jax2onnx reshapes to sizes of 0, which in ONNX are those of before.
        pairs = zip(values, eqn.invars, strict=True)
        values = [value for value, atom in pairs if 0 not in atom.aval.shape]
        return values[0] if len(values) == 1 else eqn.primitive.bind(*values, **params)
    if name == "conv_general_dilated" and not _is_plain(params):
        return conv_p.bind(*values, **params)
    if name == "gather" and _picks(eqn):
        return pick_p.bind(*values, **params)
    if name == "dot_general":  # of float rows and a matrix
        x, matrix = (atom.aval for atom in eqn.invars)
        numbers = (((x.ndim - 1,), (0,)), ((), ()))
        floats = x.dtype == matrix.dtype == eqn.outvars[0].aval.dtype == jnp.float32
        if floats and matrix.ndim == 2 and params["dimension_numbers"] == numbers:
            return matmul_p.bind(*values)
    if name == "add" and not isinstance(values[1], jax.core.Tracer):
        bias = values[1].shape
        if len(bias) > 1 and math.prod(bias) == bias[-1]:
            return add_p.bind(values[0], np.ravel(values[1]))
    if eqn.invars and [isinstance(size, int) for size in shape].count(False) == 1:
        before = eqn.invars[0].aval.shape
        spread = name == "broadcast_in_dim" and len(values) == 1
        if name in RESHAPES or (spread and math.prod(before) == math.prod(shape)):
            return reshape_p.bind(values[0], shape=shape)
        bounds = (params["start_indices"], params["limit_indices"]) if name == "slice" else ()
        if bounds and all(
            isinstance(size, int) or (start == 0 and limit == size)
            for start, limit, size in zip(*bounds, before, strict=True)
        ):
            return slice_p.bind(values[0], **params)
    return eqn.primitive.bind(*values, **params)


def _is_plain(params: Mapping[str, Any]) -> bool:
    """Returns whether jax2onnx has an operator for a convolution."""
    if params["batch_group_count"] != 1:
        raise NoForm("conv_general_dilated: ONNX has no groups of examples")
    numbers = params["dimension_numbers"]
    known = all(spec in PLAIN for spec in (numbers.lhs_spec, numbers.out_spec))
    strided = set(params["window_strides"]) != {1} and set(params["lhs_dilation"]) != {1}
    cropped = any(min(pair) < 0 for pair in params["padding"])
    return known and numbers.rhs_spec in PLAIN_KERNELS and not strided and not cropped


def _picks(eqn: core.JaxprEqn) -> bool:
    """Returns whether a gather picks from several axes, one of any size, and does nothing else."""
    params, shape = eqn.params, eqn.invars[0].aval.shape
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    axes = numbers.start_index_map
    whole = all(
        size == (1 if axis in axes else n)
        for axis, (size, n) in enumerate(zip(sizes, shape, strict=True))
    )
    return (
        len(axes) > 1
        and not all(isinstance(shape[axis], int) for axis in axes)
        and whole
        and numbers.collapsed_slice_dims == tuple(sorted(axes))
        and not numbers.operand_batching_dims
        and params["mode"] == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    )


def _bind_window(eqn: core.JaxprEqn, values: Sequence[Any]) -> Any:
    """Reduces windows by one of `REDUCERS`; returns a list where JAX has several results."""
    window = {name: eqn.params[name] for name in WINDOW}
    dtype, kind = eqn.invars[0].aval.dtype, eqn.primitive.name.removeprefix("reduce_window_")
    if kind in IDENTITIES:
        init = IDENTITIES[kind]
        if not jnp.issubdtype(dtype, jnp.floating) and init:
            limits = jnp.iinfo(dtype)
            init = limits.min if kind == "max" else limits.max
        reducer = "add" if kind == "sum" else kind
        return window_p.bind(values[0], np.asarray(init, dtype), reducer=reducer, **window)
    steps = eqn.params["jaxpr"].eqns if "jaxpr" in eqn.params else []
    if len(values) != 2 or len(steps) != 1 or steps[0].primitive.name not in REDUCERS:
        raise NoForm(
            f"{eqn.primitive.name}: ONNX has windows of {', '.join(REDUCERS)}, of one array"
        )
    return [window_p.bind(*values, reducer=steps[0].primitive.name, **window)]
