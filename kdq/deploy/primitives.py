"""The operations on codes as equations of their own, which an export can tell from others.

To JAX each is what it computes; a converter sees its name and finds the operation of its format.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

from kdq.deploy import arithmetic
from kdq.deploy.contraction import Kernel
from kdq.deploy.integer_layer import IntegerLayer, overflow_reason
from kdq.deploy.qtensor import QTensor
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


def _multiply(x: Array, w: Array, layer: IntegerLayer, *, kernel: Kernel, fixed_point: bool):
    other = layer.inputs.get("other")
    w_zero = layer.weight_zero if other is None else other.zero_point
    x_zero = layer.inputs["activations"].zero_point
    total = arithmetic.product(kernel, x, x_zero, w, layer.weight_sum, w_zero)
    total = total if layer.bias is None else total + layer.bias
    if layer.output is None:
        return total
    return arithmetic.requantize(total, layer.scale, layer.output, fixed_point=fixed_point)


product = Operation("kdq_multiply", _multiply)


def multiply(kernel: Kernel, x: Array, w: Array, layer: IntegerLayer, fixed_point: bool) -> Array:
    """Returns the product of an integer layer, with its bias: int32 sums, or codes of its output.

    `w` are the codes of its weight, arranged as the product sees them, or of its second input.
    Raises ValueError if sums of products may not fit int32.
    """
    if layer.weight is None:  # the sums are as long as what it is called with
        left = w if kernel.swapped else x
        terms = math.prod(left.shape[axis] for axis in kernel.dimension_numbers[0][0])
        if reason := overflow_reason(terms):
            raise ValueError(f"a product of two inputs can't be computed with integers: {reason}")
    return product(x, w, layer.replace(weight=None), kernel=kernel, fixed_point=fixed_point)
