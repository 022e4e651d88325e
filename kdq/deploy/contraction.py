"""The one product inside a layer, found by tracing the layer's own code.

A Linen layer rearranges its arrays (pads, transposes, splits), multiplies once, adds a bias, and
rearranges the result. Followed through its jaxpr, any layer of that form becomes an integer kernel
without a line of its own: codes take the way that the floats took.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
Reduce = Callable[[Array, tuple[int, ...]], Array]  # of the elements along axes


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
      operands: `(role, value)` for each of its arguments; None stands for a value that is not
        needed and stays None.
      multiply: `multiply(kernel, input, weight)`, or of two inputs, returns the result.
      add_bias: of the result and the bias, in the shape that the layer gave it; by default the bias
        is part of the result already.
      zeros: what stands for 0 where a role is padded; 0 if not given.

    Returns the value that the layer ends in, with its role: RESULT, or REARRANGED. Raises
    Unsupported if the layer does something else.
    """
    constant = lambda array: ("", array)

    def run_equation(eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
        inner = sub_jaxpr(eqn)
        if inner is not None:
            return evaluate(inner, values, run_equation, constant)
        roles, arrays = zip(*values, strict=True) if values else ((), ())
        name, known = eqn.primitive.name, [role for role in roles if role]
        if not known:
            return [("", array) for array in bind(eqn, arrays)]
        if name == "convert_element_type":
            return [values[0]]
        if name == "dot_general" and {RESULT, REARRANGED}.isdisjoint(known) and len(known) == 2:
            swapped = roles[0] != INPUT
            rank = eqn.invars[1 if swapped else 0].aval.ndim
            kernel = Dot(eqn.params["dimension_numbers"], rank, swapped)
            return [(RESULT, multiply(kernel, *(reversed(arrays) if swapped else arrays)))]
        if name == "conv_general_dilated" and roles == (INPUT, WEIGHT):
            return [(RESULT, multiply(conv(eqn.params), *arrays))]
        if name == "add" and sorted(known) == sorted([RESULT, BIAS]):
            return [(RESULT, add_bias(*(arrays if roles[0] == RESULT else reversed(arrays))))]
        if name in LAYOUT and len(set(known)) == 1:
            role = REARRANGED if known[0] == RESULT else known[0]
            if name == "pad":
                zero, config = (zeros or {}).get(role, 0), eqn.params["padding_config"]
                arrays, move = arrays[:1], lambda x: lax.pad(x, jnp.asarray(zero, x.dtype), config)
            else:
                move = lambda *arrays: bind(eqn, arrays)[0]
            missing = any(array is None for array in arrays)
            return [(role, None if missing else jax.tree.map(move, *arrays))]
        raise Unsupported(f"it computes {name!r} of its {' and '.join(dict.fromkeys(known))}")

    role, value = evaluate(traced, operands, run_equation, constant)[0]
    if role not in (RESULT, REARRANGED):
        raise Unsupported("its output is no product")
    return role, value


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


class Axes(NamedTuple):
    """The axes of a `Dot`: of each array those shared, free and summed; and of the result."""

    x_shared: list[int]
    x_free: list[int]
    x_summed: list[int]
    w_shared: list[int]
    w_free: list[int]
    w_summed: list[int]
    order: list[int]  # brings (shared, those of x, those of w) into the layout of the result


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


def reduce_channels(kernel: Kernel, weight: Array, reduce: Reduce) -> Array:
    """Reduces numbers of a weight's elements to one for each channel of the product's output.

    Returns an array that broadcasts with the output; `weight` may be of JAX or NumPy.
    """
    if isinstance(kernel, Dot):
        axes = list_axes(kernel, weight.ndim)
        shared, free = axes.w_shared, axes.w_free
        reduced = _reduce(weight, axes.w_summed, [*shared, *free], reduce)
        sizes = reduced.shape[: len(shared)], reduced.shape[len(shared) :]
        return reduced.reshape(*sizes[0], *[1] * len(axes.x_free), *sizes[1]).transpose(axes.order)
    numbers = kernel.dimension_numbers
    shape = [1] * weight.ndim
    shape[numbers.out_spec[1]] = -1  # [1, ..., channels, ..., 1]
    return reduce(weight, tuple(sorted(numbers.rhs_spec[1:]))).reshape(shape)


def reduce_rows(kernel: Dot, x: Array, w_rank: int, reduce: Reduce) -> Array:
    """Reduces numbers of an input's elements over the terms of a product, as `reduce_channels`."""
    axes = list_axes(kernel, w_rank)
    reduced = _reduce(x, axes.x_summed, [*axes.x_shared, *axes.x_free], reduce)
    return reduced.reshape(*reduced.shape, *[1] * len(axes.w_free)).transpose(axes.order)


def _reduce(array: Array, summed: Sequence[int], order: Sequence[int], reduce: Reduce) -> Array:
    """Reduces some axes of an array, and brings the others into an order."""
    kept = [axis for axis in range(array.ndim) if axis not in summed]
    return reduce(array, tuple(summed)).transpose([kept.index(axis) for axis in order])


def align(array: Any, rank: int) -> np.ndarray:
    """Returns an array with as many axes of one element in front as it lacks."""
    array = np.asarray(array)
    return array.reshape([1] * (rank - array.ndim) + list(array.shape))
