"""The operations on codes as equations of their own, which an export can tell from others.

To JAX each is what it computes; a converter sees its name and finds the operation of its format.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

from kdq.deploy import arithmetic
from kdq.deploy.contraction import Kernel
from kdq.deploy.integer_layer import IntegerLayer, overflow_reason
from kdq.deploy.qtensor import InputGrid, QTensor
from kdq.types import Array


def primitive(name: str, function: Callable[..., Array]) -> core.Primitive:
    """Makes a primitive with one output: `function(*arrays, **params)`."""
    new = core.Primitive(name)
    new.def_impl(function)

    def shape(*avals: Any, **params: Any) -> Any:
        out = jax.eval_shape(partial(function, **params), *avals)
        return jax.core.ShapedArray(out.shape, out.dtype)

    def batched(arrays: Any, axes: Any, **params: Any) -> tuple[Array, int]:
        return jax.vmap(partial(function, **params), axes)(*arrays), 0

    new.def_abstract_eval(shape)
    batching.primitive_batchers[new] = batched
    mlir.register_lowering(new, mlir.lower_fun(function, multiple_results=False))
    return new


class Operation:
    """A function of pytrees of arrays, and of static keywords, as one equation."""

    def __init__(self, name: str, function: Callable[..., Array]):
        flat = lambda *leaves, structure, **params: function(
            *jax.tree.unflatten(structure, leaves), **params
        )
        self.primitive = primitive(name, flat)

    def __call__(self, *arguments: Any, **params: Any) -> Array:
        leaves, structure = jax.tree.flatten(arguments)
        return self.primitive.bind(*leaves, structure=structure, **params)


def arguments(eqn: core.JaxprEqn) -> tuple[Any, ...]:
    """Returns the inputs of an operation's equation as the pytrees that it was called with."""
    return jax.tree.unflatten(eqn.params["structure"], eqn.invars)


quantize = Operation("kdq_quantize", arithmetic.quantize)
dequantize = Operation("kdq_dequantize", arithmetic.dequantize)
to_float = Operation("kdq_to_float", arithmetic.to_float)
weight = Operation("kdq_weight", QTensor.dequantize)
rows = Operation("kdq_rows", lambda indices, table: table.rows(indices))


class ProductParts(NamedTuple):
    """All that a product of codes is computed with beside the two arrays of codes.

    Arrays broadcast with the output of the product, those of a grid are scalars.
    """

    x: InputGrid  # of the input
    other: InputGrid | None  # of the second input; None: it meets a weight
    w_scale: Array | None  # float32; these are of the weight
    w_sum: Array | None  # int32, of its codes
    w_zero: Array | None  # int32, of the weight or the second input; None is 0
    bias: Array | None  # int32, at `scale`
    scale: Array | None  # float32, of the sums; None where they stay sums
    grid: InputGrid | None  # of the codes to make; None: int32 sums


def _multiply(x: Array, w: Array, parts: ProductParts, *, kernel: Kernel, fixed_point: bool):
    total = arithmetic.product(kernel, x, parts.x.zero_point, w, parts.w_sum, parts.w_zero)
    total = total if parts.bias is None else total + parts.bias
    if parts.grid is None:
        return total
    return arithmetic.requantize(total, parts.scale, parts.grid, fixed_point=fixed_point)


product = Operation("kdq_multiply", _multiply)


def multiply(
    kernel: Kernel,
    x: Array,
    w: Array,
    layer: IntegerLayer,
    grid: InputGrid | None,
    fixed_point: bool,
) -> Array:
    """Returns the product of an integer layer, with its bias: int32 sums, or the codes of `grid`.

    `w` are the codes of its weight, arranged as the product sees them, or of its second input.
    Raises ValueError if sums of products may not fit int32.
    """
    other = None if layer.weight is not None else layer.inputs["other"]
    if other is not None:  # its sums are as long as what it is called with
        left = w if kernel.swapped else x
        terms = math.prod(left.shape[axis] for axis in kernel.dimension_numbers[0][0])
        if reason := overflow_reason(terms):
            raise ValueError(f"a product of two inputs can't be computed with integers: {reason}")
    parts = ProductParts(
        x=layer.inputs["activations"],
        other=other,
        w_scale=layer.weight_scale,
        w_sum=layer.weight_sum,
        w_zero=layer.weight_zero if other is None else other.zero_point,
        bias=layer.bias,
        scale=None if grid is None else layer.scale,
        grid=grid,
    )
    return product(x, w, parts, kernel=kernel, fixed_point=fixed_point)
