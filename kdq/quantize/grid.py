"""Integer grids: the real numbers that the codes of a quantizer stand for.

A quantizer is a dict of four float32 arrays, `{"scale", "zero_point", "qmin", "qmax"}`: code `q`
stands for `(q - zero_point) * scale`, with `qmin <= q <= qmax`. The limits are data, not Python
numbers, so one compiled function serves every bit-width.

`scale` and `zero_point` align with the tensor as in NumPy broadcasting, except that a dimension may
also *divide* the tensor's: a kernel `[in, out]` with a scale `[in / 128, out]` is quantized in
groups of 128 inputs. All granularities are shapes of `scale`; nothing else tells them apart.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kdq.types import Array

Quantizer = dict[str, Array]


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


@partial(jax.jit, static_argnames=("symmetric", "signed", "narrow"))
def from_range(
    low: Array,
    high: Array,
    bits: Array | int,
    *,
    symmetric: bool = True,
    signed: bool = True,
    narrow: bool = False,
) -> Quantizer:
    """The quantizer whose outermost codes reach `low` and `high` (any shape; widened to hold 0).

    Symmetric: `scale = max(|low|, |high|) / qmax` and no offset, except for one signed bit, whose
    two codes stand for ±max(|low|, |high|). Affine: `scale = (high - low) / (qmax - qmin)` and an
    integer zero point, so that 0 is exact. A range of width 0 (an all-zero channel) gets scale 1:
    its zeros stay zeros.
    """
    low = jnp.minimum(jnp.asarray(low, jnp.float32), 0.0)
    high = jnp.maximum(jnp.asarray(high, jnp.float32), 0.0)
    qmin, qmax = limits(bits, signed=signed, narrow=narrow)
    if symmetric:
        reach = jnp.maximum(-low, high)
        is_sign = jnp.logical_and(signed, jnp.asarray(bits) == 1)
        scale = jnp.where(is_sign, 2.0 * reach, reach / qmax)
    else:
        scale = (high - low) / (qmax - qmin)
    # Subnormal scales would overflow in 1 / scale.
    empty = scale <= jnp.finfo(jnp.float32).tiny
    scale = jnp.where(empty, 1.0, scale)
    if symmetric:
        zero_point = jnp.where(is_sign & ~empty, 0.5, 0.0)
    else:
        zero_point = jnp.clip(jnp.round(qmin - low / scale), qmin, qmax)
    return {"scale": scale, "zero_point": zero_point, "qmin": qmin, "qmax": qmax}


def expand(parameter: Array, shape: tuple[int, ...]) -> Array:
    """`parameter` repeated so that it broadcasts against a tensor of `shape`.

    Dimensions of 1 are left to broadcasting; one that divides the tensor's is repeated block-wise.
    """
    parameter = jnp.asarray(parameter)
    offset = len(shape) - parameter.ndim
    for axis, (size, full) in enumerate(zip(parameter.shape, shape[offset:], strict=True)):
        if size not in (1, full):
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
    if x.ndim > 1:
        # XLA's CPU backend has a fast sum, but fuses what makes `x` into a slow one of its own.
        x = jax.lax.optimization_barrier(x)
    axes = tuple(i for i, s in enumerate(padded) if s == 1)
    return x.sum(axes).reshape(scale_shape)


def position(x: Array, scale: Array, zero_point: Array) -> Array:
    """`x` in units of codes, float32, neither rounded nor clipped."""
    # A reciprocal of the small array and a product over the large one: cheaper than a division.
    return x.astype(jnp.float32) * expand(1.0 / scale, x.shape) + expand(zero_point, x.shape)


def to_codes(x: Array, quantizer: Quantizer) -> Array:
    """Integer codes of `x`, as float32 of the same shape (see `fake_quantize`, which trains)."""
    codes = jnp.round(position(x, quantizer["scale"], quantizer["zero_point"]))
    return jnp.clip(codes, quantizer["qmin"], quantizer["qmax"])


def from_codes(codes: Array, quantizer: Quantizer) -> Array:
    """The float32 numbers that `codes` stand for."""
    scale, zero_point = (expand(quantizer[k], codes.shape) for k in ("scale", "zero_point"))
    return (codes.astype(jnp.float32) - zero_point) * scale


def bits(quantizer: Quantizer) -> int:
    """Bits that hold every code of the quantizer."""
    codes = np.asarray(quantizer["qmax"]) - np.asarray(quantizer["qmin"]) + 1
    return int(np.ceil(np.log2(codes.max())))
