"""The one product inside a layer, found by tracing the layer's own code.

A Linen layer rearranges its arrays (pads, transposes, splits), multiplies once, adds a bias, and
rearranges the result. Followed through its jaxpr, any layer of that form becomes an integer kernel
without a line of its own: codes take the way that the floats took.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from kdq.deploy.jaxprs import bind, evaluate
from kdq.quantize.kinds import Unsupported
from kdq.quantize.tracing import LAYOUT, sub_jaxpr
from kdq.types import Array

# The roles of a layer's arrays; "" is one that has none.
INPUT, OTHER, WEIGHT, BIAS, RESULT = "input", "second input", "weight", "bias", "result"
REARRANGED = "rearranged result"
Value = tuple[str, Any]  # a role, and a pytree of arrays that are rearranged alike


@dataclasses.dataclass(frozen=True)
class Dot:
    """`lax.dot_general` of an input and what it meets; the other way around if `swapped`."""

    dimension_numbers: tuple
    rank: int  # of the input
    swapped: bool = False


@dataclasses.dataclass(frozen=True)
class Conv:
    """`lax.conv_general_dilated` of an input and a weight."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    dimension_numbers: lax.ConvDimensionNumbers
    groups: int


Kernel = Dot | Conv


def contracted_terms(traced: core.ClosedJaxpr) -> int:
    """Returns how many products the longest sum of a layer's `dot_general`s adds up."""
    terms = 0
    for eqn in traced.jaxpr.eqns:
        inner = sub_jaxpr(eqn)
        if inner is not None:
            terms = max(terms, contracted_terms(inner))
        elif eqn.primitive.name == "dot_general":
            axes = eqn.params["dimension_numbers"][0][0]
            terms = max(terms, math.prod(eqn.invars[0].aval.shape[axis] for axis in axes))
    return terms


def follow(
    traced: core.ClosedJaxpr,
    operands: Sequence[Value],
    multiply: Callable[[Kernel, Any, Any], Any],
    *,
    add_bias: Callable[[Any, Any], Any] = lambda result, bias: result,
    zeros: Mapping[str, Any] | None = None,
) -> Value:
    """Takes the way of a layer's arrays with others in their place.

    Args:
      traced: the layer as traced with floats.
      operands: `(role, value)` for each of its arguments. A value is a pytree of arrays of the
        argument's shape, all of which are rearranged alike; None stands for one that is not needed
        and stays None.
      multiply: `multiply(kernel, input, weight)`, or of two inputs, returns the result.
      add_bias: of the result and the bias, in the shape that the layer gave it, returns the result.
        By default the bias is part of the result already.
      zeros: what stands for 0 where a role is padded; 0 if not given.

    Returns:
      The value that the layer ends in, with its role: RESULT, or REARRANGED.

    Raises:
      Unsupported: the layer does something else.
    """
    constant = lambda array: ("", array)

    def run_equation(eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
        inner = sub_jaxpr(eqn)
        if inner is not None:
            return evaluate(inner, values, run_equation, constant)
        roles, arrays = zip(*values, strict=True) if values else ((), ())
        if not any(roles):
            return [("", array) for array in bind(eqn, arrays)]
        return [run_with_roles(eqn, roles, arrays)]

    def run_with_roles(eqn: core.JaxprEqn, roles: tuple[str, ...], arrays: tuple) -> Value:
        name, known = eqn.primitive.name, [role for role in roles if role]
        if name == "convert_element_type":
            return roles[0], arrays[0]
        if name == "dot_general" and {RESULT, REARRANGED}.isdisjoint(known) and len(known) == 2:
            swapped = roles[0] != INPUT
            rank = eqn.invars[1 if swapped else 0].aval.ndim
            kernel = Dot(eqn.params["dimension_numbers"], rank, swapped)
            return RESULT, multiply(kernel, *(reversed(arrays) if swapped else arrays))
        if name == "conv_general_dilated" and roles == (INPUT, WEIGHT):
            return RESULT, multiply(conv(eqn.params), *arrays)
        if name == "add" and sorted(known) == sorted([RESULT, BIAS]):
            result, bias = arrays if roles[0] == RESULT else reversed(arrays)
            return RESULT, add_bias(result, bias)
        if name in LAYOUT and len(set(known)) == 1:
            role = REARRANGED if known[0] == RESULT else known[0]
            return role, _rearrange(eqn, arrays, (zeros or {}).get(role, 0))
        raise Unsupported(f"it computes {name!r} of its {' and '.join(dict.fromkeys(known))}")

    role, value = evaluate(traced, operands, run_equation, constant)[0]
    if role not in (RESULT, REARRANGED):
        raise Unsupported("its output is no product")
    return role, value


def _rearrange(eqn: core.JaxprEqn, values: Sequence[Any], zero: Any) -> Any:
    """Returns a value with the layout operation on each of its arrays."""
    if eqn.primitive.name == "pad":
        filled = lambda x: lax.pad(x, jnp.asarray(zero, x.dtype), eqn.params["padding_config"])
        return None if values[0] is None else jax.tree.map(filled, values[0])
    if any(value is None for value in values):
        return None
    return jax.tree.map(lambda *arrays: bind(eqn, arrays)[0], *values)


def conv(params: Mapping[str, Any]) -> Conv:
    """Returns a convolution, by the parameters of its equation."""
    if params["batch_group_count"] != 1:
        raise Unsupported("a convolution with groups of examples")
    return Conv(
        strides=tuple(params["window_strides"]),
        padding=tuple(map(tuple, params["padding"])),
        input_dilation=tuple(params["lhs_dilation"]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        dimension_numbers=params["dimension_numbers"],
        groups=params["feature_group_count"],
    )


def reduce_channels(kernel: Kernel, values: Array, reduce: Callable) -> Array:
    """Reduces numbers of a weight's elements to one for each channel of the product's output.

    Args:
      kernel: the product.
      values: of the weight's shape, as the product sees it; of JAX or NumPy.
      reduce: `reduce(values, axes)` of the elements of a channel.

    Returns:
      An array that broadcasts with the output.
    """
    if isinstance(kernel, Conv):
        numbers = kernel.dimension_numbers
        shape = [1] * values.ndim
        shape[numbers.out_spec[1]] = -1  # [1, ..., channels, ..., 1]
        return reduce(values, tuple(sorted(numbers.rhs_spec[1:]))).reshape(shape)
    return reduce_side(kernel, values, 0 if kernel.swapped else 1, kernel.rank, reduce)


def reduce_side(kernel: Dot, values: Array, side: int, rank: int, reduce: Callable) -> Array:
    """Reduces as `reduce_channels` does, the left (0) or the right (1) array of a `dot_general`.

    `rank` is the other's.
    """
    contracting, batch = kernel.dimension_numbers
    summed, shared = contracting[side], batch[side]
    free = [a for a in range(values.ndim) if a not in (*summed, *shared)]
    kept = [a for a in range(values.ndim) if a not in summed]
    # [*shared, *free], as `dot_general` has them in its output.
    reduced = reduce(values, tuple(summed)).transpose([kept.index(a) for a in (*shared, *free)])
    shared_sizes, free_sizes = reduced.shape[: len(shared)], reduced.shape[len(shared) :]
    # Its output is [*shared, *free of the left, *free of the right]; the other's are of size 1.
    others = (1,) * (rank - len(summed) - len(shared))
    free_axes = (*free_sizes, *others) if side == 0 else (*others, *free_sizes)
    return reduced.reshape((*shared_sizes, *free_axes))


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a `Dot`: of each array those shared, free and summed; and of the result."""

    x_shared: list[int]
    x_free: list[int]
    x_summed: list[int]
    w_shared: list[int]
    w_free: list[int]
    w_summed: list[int]
    order: list[int]  # brings (shared, those of x, those of w) into the layout of the result

    @property
    def back(self) -> np.ndarray:
        """The inverse of `order`."""
        return np.argsort(self.order)


def list_axes(kernel: Dot, w_rank: int) -> Axes:
    """Returns the axes of the input of a product, and of what it meets."""
    (summed, shared), turn = kernel.dimension_numbers, -1 if kernel.swapped else 1
    (x_summed, w_summed), (x_shared, w_shared) = summed[::turn], shared[::turn]
    others = lambda rank, used: [axis for axis in range(rank) if axis not in used]
    x_free = others(kernel.rank, (*x_summed, *x_shared))
    w_free = others(w_rank, (*w_summed, *w_shared))
    # The result has the axes of the left factor before those of the right.
    order = list(range(len(x_shared) + len(x_free) + len(w_free)))
    if kernel.swapped:
        first, second = len(x_shared), len(x_shared) + len(x_free)
        order = [*order[:first], *order[second:], *order[first:second]]
    return Axes(*map(list, (x_shared, x_free, x_summed, w_shared, w_free, w_summed, order)))


def align(array: Any, rank: int) -> np.ndarray:
    """Returns an array with as many axes of one element in front as it lacks."""
    array = np.asarray(array)
    return array.reshape([1] * (rank - array.ndim) + list(array.shape))
