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

from kdq.quantize.kinds import Unsupported
from kdq.quantize.tracing import LAYOUT, sub_jaxpr
from kdq.types import Array

INPUT, OTHER, WEIGHT, BIAS, RESULT = "input", "second input", "weight", "bias", "result"
MOVED = "rearranged result"


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

    @property
    def rank(self) -> int:
        """Of the input."""
        return len(self.dimension_numbers.lhs_spec)


Kernel = Dot | Conv


class Steps:
    """What happens at a layer's product and its bias; see `follow`."""

    def multiply(self, kernel: Kernel, left: Any, right: Any) -> Any:
        """The result of the product of an input and a weight, or of two inputs."""
        raise NotImplementedError

    def add_bias(self, result: Any, bias: Any) -> Any:
        """The result with a bias of the shape that the layer gave it."""
        raise NotImplementedError


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


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> Any:
    """An equation on other values."""
    function = lambda *arrays: eqn.primitive.bind(*arrays, **eqn.params)
    if eqn.primitive.name == "dim_as_value":  # the size of a batch is known when a program runs
        return function(*values)
    if all(isinstance(size, int) for var in eqn.outvars for size in var.aval.shape):
        return at_once(function, *values)
    return function(*values)  # of a batch of any size


def at_once(function: Callable[..., Any], *values: Any) -> Any:
    """`function(*values)`, computed now if all are known, whatever is being traced."""
    if any(isinstance(value, jax.core.Tracer) for value in values):
        return function(*values)
    with jax.ensure_compile_time_eval():
        return function(*values)


def follow(
    traced: core.ClosedJaxpr, operands: Sequence[tuple[str, Any]], steps: Steps, zeros: Mapping
) -> tuple[str, Any]:
    """Takes the way of a layer's arrays with others in their place.

    Args:
      traced: the layer as traced with floats.
      operands: `(role, value)` for each of its arguments. A value is a pytree of arrays of the
        argument's shape, all of which are rearranged alike; None stands for one that is not needed
        and stays None.
      steps: what to do at the product and the bias.
      zeros: what stands for 0 where a role is padded.

    Returns:
      The value that the layer ends in, with its role: RESULT, or MOVED.

    Raises:
      Unsupported: the layer does something else.
    """
    known: dict[core.Var, tuple[str, Any]] = {}
    _follow(traced, operands, steps, zeros, known)
    role, value = _look_up(known, traced.jaxpr.outvars[0])
    if role not in (RESULT, MOVED):
        raise Unsupported("its output is no product")
    return role, value


def _look_up(known: Mapping, atom: Any) -> tuple[str, Any]:
    return ("", atom.val) if isinstance(atom, core.Literal) else known[atom]


def _follow(traced, operands, steps, zeros, known) -> list[tuple[str, Any]]:
    known.update(zip(traced.jaxpr.invars, operands, strict=True))
    known.update((v, ("", c)) for v, c in zip(traced.jaxpr.constvars, traced.consts, strict=True))
    for eqn in traced.jaxpr.eqns:
        given = [_look_up(known, atom) for atom in eqn.invars]
        inner = sub_jaxpr(eqn)
        if inner is not None:
            found = _follow(inner, given, steps, zeros, dict(known))
        else:
            found = [_step(eqn, given, steps, zeros)]
        known.update(zip(eqn.outvars, found, strict=False))
    return [_look_up(known, atom) for atom in traced.jaxpr.outvars]


def _step(eqn, given, steps, zeros) -> tuple[str, Any]:
    """The role and the value of the first output of an equation."""
    name, roles = eqn.primitive.name, [role for role, _ in given]
    meant = [role for role in roles if role]
    values = [value for _, value in given]
    if not meant:
        out = bind(eqn, values)
        return "", out[0] if eqn.primitive.multiple_results else out
    if name == "convert_element_type":
        return given[0]
    if name == "dot_general" and {RESULT, MOVED}.isdisjoint(meant) and len(meant) == 2:
        swapped = roles[0] != INPUT
        rank = eqn.invars[1 if swapped else 0].aval.ndim
        kernel = Dot(eqn.params["dimension_numbers"], rank, swapped)
        return RESULT, steps.multiply(kernel, *(reversed(values) if swapped else values))
    if name == "conv_general_dilated" and roles == [INPUT, WEIGHT]:
        return RESULT, steps.multiply(conv(eqn.params), *values)
    if name == "add" and sorted(meant) == sorted([RESULT, BIAS]):
        result, bias = values if roles[0] == RESULT else reversed(values)
        return RESULT, steps.add_bias(result, bias)
    if name in LAYOUT and len(set(meant)) == 1:
        role = MOVED if meant[0] == RESULT else meant[0]
        return role, _rearrange(eqn, given, zeros.get(role, 0))
    raise Unsupported(f"it computes {name!r} of its {' and '.join(dict.fromkeys(meant))}")


def _rearrange(eqn, given, zero) -> Any:
    """A layout operation on every array of a value."""
    if eqn.primitive.name == "pad":
        value = given[0][1]
        filled = lambda x: lax.pad(x, jnp.asarray(zero, x.dtype), eqn.params["padding_config"])
        return None if value is None else jax.tree.map(filled, value)
    values = [value for _, value in given]
    if any(value is None for value in values):
        return None
    return jax.tree.map(lambda *arrays: bind(eqn, arrays), *values)


def conv(params: Mapping[str, Any]) -> Conv:
    """A convolution, by the parameters of its equation."""
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


def of_channels(kernel: Kernel, values: Array, reduce: Callable) -> Array:
    """Numbers of a weight's elements as one for each channel of the product's output.

    Args:
      kernel: the product.
      values: of the weight's shape, as the product sees it; of JAX or NumPy.
      reduce: `reduce(values, axes)`: what becomes of the elements of a channel.

    Returns:
      An array that broadcasts with the output.
    """
    if isinstance(kernel, Conv):
        numbers = kernel.dimension_numbers
        shape = [1] * values.ndim
        shape[numbers.out_spec[1]] = -1
        return reduce(values, tuple(sorted(numbers.rhs_spec[1:]))).reshape(shape)
    return of_side(kernel, values, 0 if kernel.swapped else 1, kernel.rank, reduce)


def of_side(kernel: Dot, values: Array, side: int, rank: int, reduce: Callable) -> Array:
    """As `of_channels`, of the left (0) or the right (1) array of a `dot_general`.

    `rank` is the other's.
    """
    contracting, batch = kernel.dimension_numbers
    summed, shared = contracting[side], batch[side]
    free = [a for a in range(values.ndim) if a not in (*summed, *shared)]
    kept = [a for a in range(values.ndim) if a not in summed]
    found = reduce(values, tuple(summed)).transpose([kept.index(a) for a in (*shared, *free)])
    shape, own = found.shape[: len(shared)], found.shape[len(shared) :]
    others = (1,) * (rank - len(summed) - len(shared))
    return found.reshape((*shape, *own, *others) if side == 0 else (*shape, *others, *own))


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


def axes(kernel: Dot, w_rank: int) -> Axes:
    """The axes of the input of a product, and of what it meets."""
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


def aligned(array: Any, rank: int) -> np.ndarray:
    """An array with as many axes of one element in front as it lacks."""
    array = np.asarray(array)
    return array.reshape([1] * (rank - array.ndim) + list(array.shape))
