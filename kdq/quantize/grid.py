"""Grids: the real numbers that the codes of a quantizer stand for.

`scale` and `zero_point` align with the tensor as in NumPy broadcasting, except that a dimension may
also *divide* the tensor's: a kernel `[in, out]` with a scale `[in / 128, out]` is quantized in
groups of 128 inputs. All granularities are shapes of `scale`; nothing else tells them apart.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kdq.quantize import choice, formats
from kdq.quantize.formats import FORMATS
from kdq.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The behaviour of a quantizer under differentiation; forward it computes what its grid says.

    Methods of quantization-aware training are values of this (see `qat`).
    """

    # What of the quantizer trains: none, some or all of these.
    trains: tuple[str, ...] = ("scale",)
    # "full": by the rounding error inside the grid too (LSQ); "clipped": by what it clips (PACT).
    scale_gradient: str = "full"
    # Where it rounds: g (1 + elementwise · sign(g) · (v - q)) for the gradient g (EWGS).
    elementwise: float = 0.0
    # The scale's gradient over √(elements × qmax), which makes it comparable with a weight's (LSQ).
    gradient_scale: bool = False
    # λ of λ/2 · bound², the decay of what the grid reaches, whose gradient is added (PACT).
    decay: float = 0.0
    # "tanh": of the weight before it is rounded, stretched over the whole grid (DoReFa).
    transform: str = ""
    # Rounded up or down by chance, in training steps alone: these hand out the keys.
    stochastic: bool = False


class Quantizer(flax.struct.PyTreeNode):
    """A map from numbers to codes and back.

    Code `q` stands for `(q - zero_point) * scale`, with `qmin <= q <= qmax`; if there are `levels`,
    for `levels[q] * scale`. Arrays are data, so one compiled function serves every bit-width.

    Invariants: `scale` is positive and `zero_point` has its shape; `qmin` and `qmax` are scalars.
    Of a stack of layers (`nn.scan`, `nn.vmap`) each array has the stack's axes in front, so that
    `qmin.shape` is the shape of the stack.
    """

    scale: Array  # float32
    zero_point: Array  # float32, the code of 0; a half for one signed bit
    qmin: Array  # float32, the smallest code
    qmax: Array  # float32, the largest
    levels: Array | None = None  # [codes] float32, ascending: a number format instead of integers
    key: Array | None = None  # random, of one step: round by chance instead of to the nearest
    # What follows is static: it decides what is compiled.
    scale_format: str = flax.struct.field(default="", pytree_node=False)  # see `formats`
    dynamic: "Dynamic | None" = flax.struct.field(default=None, pytree_node=False)
    training: Training = flax.struct.field(default=Training(), pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic:
    """The scale is computed anew from each tensor; the quantizer's own is not used."""

    granularity: str  # "per_tensor", "per_token" (all but the last axis), "per_group" (of the last)
    group_size: int | None = None  # with "per_group"
    symmetric: bool = True


def limits(bits: Array | int, *, signed: bool, narrow: bool = False) -> tuple[Array, Array]:
    """Smallest and largest code of a `bits`-bit grid (`bits` may be traced).

    One signed bit is the sign, codes 0 and 1 around a zero point of 1/2 (see `from_range`).
    """
    bits = jnp.asarray(bits, jnp.float32)
    if not signed:
        return jnp.zeros_like(bits), jnp.exp2(bits) - 1
    half = jnp.exp2(bits - 1)
    low, high = -half + float(narrow), half - 1
    return jnp.where(bits == 1, 0.0, low), jnp.where(bits == 1, 1.0, high)


@partial(jax.jit, static_argnames=("symmetric", "signed", "narrow", "format"))
def from_range(
    low: Array,
    high: Array,
    bits: Array | int,
    *,
    symmetric: bool = True,
    signed: bool = True,
    narrow: bool = False,
    format: str = "",
) -> Quantizer:
    """The quantizer whose outermost codes reach `low` and `high` (any shape; widened to hold 0).

    Symmetric: `scale = max(|low|, |high|) / qmax` and no offset, except for one signed bit, whose
    two codes stand for ±max(|low|, |high|). Affine: `scale = (high - low) / (qmax - qmin)` and an
    integer zero point, so that 0 is exact. With a `format`, a key of `FORMATS`, the largest level
    times the scale is max(|low|, |high|), and `bits` does not matter. A range of width 0 (an
    all-zero channel) gets scale 1: its zeros stay zeros.
    """
    if format:
        levels = jnp.asarray(FORMATS[format].levels, jnp.float32)
        template = Quantizer(
            scale=jnp.float32(1),
            zero_point=jnp.float32(0),
            qmin=jnp.float32(0),
            qmax=jnp.float32(len(levels) - 1),
            levels=levels,
            scale_format=FORMATS[format].scale_format,
        )
    else:
        qmin, qmax = limits(bits, signed=signed, narrow=narrow)
        half = jnp.where(jnp.logical_and(signed and symmetric, jnp.asarray(bits) == 1), 0.5, 0.0)
        template = Quantizer(scale=jnp.float32(1), zero_point=half, qmin=qmin, qmax=qmax)
    return fit(template, low, high, symmetric=symmetric)


def fit(quantizer: Quantizer, low: Array, high: Array, *, symmetric: bool) -> Quantizer:
    """`quantizer` with the scale and zero point at which it reaches `low` and `high`.

    What else it is decides how: with levels by the largest; one signed bit, recognized by its zero
    point of 1/2, by half the distance of its two codes. Near the ends of float32 the range is a
    little narrower, so that the scale, its inverse, and what each code stands for are numbers.
    """
    qmin, qmax = quantizer.qmin, quantizer.qmax
    steps = qmax - qmin
    # A code lies up to a step beyond the end, and rounding adds a half. Infinity stays to be seen.
    largest = jnp.finfo(jnp.float32).max / (1 + 3 / steps)
    bounded = lambda v: jnp.where(jnp.isinf(v), v, jnp.clip(v, -largest, largest))
    low = bounded(jnp.minimum(jnp.asarray(low, jnp.float32), 0.0))
    high = bounded(jnp.maximum(jnp.asarray(high, jnp.float32), 0.0))
    reach = jnp.maximum(-low, high)
    is_sign = quantizer.zero_point.max() == 0.5
    if quantizer.levels is not None:
        scale = reach / quantizer.levels[-1]
    elif symmetric:
        scale = jnp.where(is_sign, 2.0 * reach, reach / qmax)
    else:
        span = high - low
        scale = jnp.where(jnp.isfinite(span), span / steps, high / steps - low / steps)
    scale = jnp.where(jnp.isinf(scale), scale, jnp.minimum(scale, 2.0**126))  # has an inverse
    # Subnormal scales would overflow in 1 / scale.
    empty = scale <= jnp.finfo(jnp.float32).tiny
    scale = jnp.where(empty, 1.0, scale)
    if symmetric or quantizer.levels is not None:
        zero_point = jnp.where(is_sign & ~empty, jnp.float32(0.5), jnp.float32(0))
    else:
        zero_point = jnp.clip(jnp.round(qmin - low / scale), qmin, qmax)
    return quantizer.replace(scale=scale, zero_point=zero_point)


def expand(parameter: Array, shape: tuple[int, ...]) -> Array:
    """`parameter` repeated so that it broadcasts against a tensor of `shape`.

    Dimensions of 1 are left to broadcasting; one that divides the tensor's is repeated block-wise.
    """
    parameter = jnp.asarray(parameter)
    offset = len(shape) - parameter.ndim
    for axis, (size, full) in enumerate(zip(parameter.shape, shape[offset:], strict=True)):
        if size not in (1, full):
            if full % size:
                raise ValueError(f"a parameter of shape {parameter.shape} for a tensor of {shape}")
            parameter = jnp.repeat(parameter, full // size, axis=axis, total_repeat_length=full)
    return parameter


def to_groups(x: Array, scale_shape: tuple[int, ...]) -> Array:
    """`x` as `[groups, elements]`: a row for each element of a scale of `scale_shape`."""
    scale_shape = (1,) * (x.ndim - len(scale_shape)) + tuple(scale_shape)
    blocks = [(s, d // s) for s, d in zip(scale_shape, x.shape, strict=True)]
    order = [*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)]
    split = x.reshape([n for block in blocks for n in block]).transpose(order)
    return split.reshape(math.prod(scale_shape), -1)


def reduce_to(x: Array, scale_shape: tuple[int, ...]) -> Array:
    """Sum of `x` over the elements that share a scale; the transpose of `expand`."""
    padded = (1,) * (x.ndim - len(scale_shape)) + tuple(scale_shape)
    if any(1 < s < d for s, d in zip(padded, x.shape, strict=True)):
        return to_groups(x, scale_shape).sum(-1).reshape(scale_shape)
    axes = tuple(i for i, s in enumerate(padded) if s == 1)
    return x.sum(axes).reshape(scale_shape)


def position(x: Array, scale: Array, zero_point: Array) -> Array:
    """`x` in units of codes, float32, neither rounded nor clipped."""
    # A reciprocal of the small array and a product over the large one: cheaper than a division.
    return x.astype(jnp.float32) * expand(1.0 / scale, x.shape) + expand(zero_point, x.shape)


def resolve(x: Array, quantizer: Quantizer) -> Quantizer:
    """The quantizer that `x` meets: its scale computed if dynamic, rounded if it has a format."""
    if quantizer.dynamic is not None:
        quantizer = _from_tensor(jax.lax.stop_gradient(x), quantizer)
    return with_rounded_scale(quantizer)


def with_rounded_scale(quantizer: Quantizer) -> Quantizer:
    """The quantizer with a scale that its `scale_format` holds; of one layer, not of a stack."""
    if not quantizer.scale_format:
        return quantizer
    rounding = formats.ROUNDINGS[quantizer.scale_format]
    raw = jax.lax.stop_gradient(quantizer.scale)
    rounded = rounding(raw, quantizer.levels)
    # The gradient of the logarithm passes through the rounding unchanged (arXiv:1903.08066).
    scale = rounded + (quantizer.scale - raw) * (rounded / raw)
    return quantizer.replace(scale=scale, scale_format="")


def _from_tensor(x: Array, quantizer: Quantizer) -> Quantizer:
    how = quantizer.dynamic
    shape = {
        "per_tensor": (1,) * x.ndim,
        "per_token": (*x.shape[:-1], 1),
        "per_group": (*x.shape[:-1], x.shape[-1] // (how.group_size or 1)),
    }[how.granularity]
    groups = to_groups(x.astype(jnp.float32), shape)
    low, high = (extreme.reshape(shape) for extreme in (groups.min(-1), groups.max(-1)))
    return fit(quantizer, low, high, symmetric=how.symmetric).replace(dynamic=None)


def over_stack(function: Callable[[Array, Quantizer], Any], quantizer: Quantizer) -> Callable:
    """`function(x, quantizer)` of one layer, mapped over the stack of layers that it is for."""
    for _ in range(jnp.ndim(quantizer.qmin)):
        function = jax.vmap(function)
    return function


def to_codes(x: Array, quantizer: Quantizer) -> Array:
    """Integer codes of `x`, as float32 of the same shape (see `fake_quantize`, which trains)."""
    quantizer = resolve(x, quantizer)
    levels = quantizer.levels
    at = position(x, quantizer.scale, quantizer.zero_point if levels is None else jnp.float32(0))
    if quantizer.key is None:
        codes = choice.nearest(at, levels)
    else:
        codes = choice.by_chance(at, levels, quantizer.key)
    return jnp.clip(codes, quantizer.qmin, quantizer.qmax)


def from_codes(codes: Array, quantizer: Quantizer) -> Array:
    """The float32 numbers that `codes` stand for."""
    quantizer = with_rounded_scale(quantizer)
    scale = expand(quantizer.scale, codes.shape)
    if quantizer.levels is not None:
        return quantizer.levels[codes.astype(jnp.int32)] * scale
    return (codes.astype(jnp.float32) - expand(quantizer.zero_point, codes.shape)) * scale


def points(quantizer: Quantizer) -> Array:
    """All numbers that codes of a quantizer stand for, in the order of the codes: [codes] float32.

    Raises ValueError for more than one scale.
    """
    if quantizer.scale.size > 1:
        raise ValueError(f"points: expected one scale, got {quantizer.scale.shape}")
    codes = jnp.arange(int(quantizer.qmin), int(quantizer.qmax) + 1)
    flat = quantizer.replace(
        scale=quantizer.scale.reshape(()), zero_point=quantizer.zero_point.reshape(())
    )
    return from_codes(codes, flat)


def bits(quantizer: Quantizer) -> int:
    """Bits that hold every code of the quantizer."""
    codes = np.asarray(quantizer.qmax) - np.asarray(quantizer.qmin) + 1
    return int(np.ceil(np.log2(codes.max())))
