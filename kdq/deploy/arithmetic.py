"""Arithmetic on codes: what an integer kernel computes, in the order in which it does.

It is that of ONNX Runtime's kernels, bit for bit: a product is summed in int32, its bias is an
int32 at the scale of the sum, and a sum becomes a code by one float32 multiplication that is
rounded to the nearest, halves to even; or, the way of microcontrollers, by `multiply_fixed_point`.

Inputs are uint8 codes around a zero point (`InputGrid`), weights signed codes (`QTensor`). Sums are
of `(x - zero_point) * w`, but no such difference is ever made: `x` goes in as it is, less 128 so
that it is an int8, and what that adds, `(128 - zero_point) * sum(w)`, is taken off afterwards.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from kdq.deploy.contraction import Conv, Dot, Kernel, list_axes, reduce_channels, reduce_rows
from kdq.deploy.qtensor import InputGrid
from kdq.types import Array

LARGEST = np.finfo(np.float32).max


def product(
    kernel: Kernel,
    x: Array,
    x_zero: Array,
    w: Array,
    w_sum: Array | None = None,
    w_zero: Array | None = None,
) -> Array:
    """Returns `sum((x - x_zero) * (w - w_zero))` in int32.

    With `a = x - 128`, `a_zero = x_zero - 128` and n terms in a sum, this is
    `sum(a w) - a_zero sum(w) - w_zero (sum(a) - n a_zero)`; arXiv:1712.05877, equation 7.

    Args:
      kernel: which product.
      x: uint8 codes of an input; a convolution pads them with their zero point.
      x_zero: int32, of `x`.
      w: int8 (or smaller) codes of a weight; or uint8, of a second input.
      w_sum: int32, their sum for each output channel, which broadcasts with the output; computed
        here if not given.
      w_zero: int32, their zero point, which broadcasts with the output; None is 0.
    """
    if isinstance(kernel, Conv):
        edges = zip(kernel.padding, kernel.input_dilation, strict=True)
        spatial = kernel.dimension_numbers.lhs_spec[2:]
        config = [(0, 0, 0)] * x.ndim
        for axis, ((low, high), dilation) in zip(spatial, edges, strict=True):
            config[axis] = (low, high, dilation - 1)
        x = lax.pad(x, x_zero.astype(x.dtype), config)
    less_128 = lambda codes: (codes.astype(jnp.int16) - 128).astype(jnp.int8)
    sum_up = lambda codes, axes: codes.astype(jnp.int32).sum(axes)
    left, left_zero = less_128(x), x_zero - 128  # a, a_zero
    if w.dtype == jnp.uint8:
        w, w_zero = less_128(w), w_zero - 128
    w = w.astype(jnp.int8)
    if w_sum is None:
        w_sum = reduce_channels(kernel, w, sum_up)
    total = _multiply(kernel, left, w) - left_zero * w_sum
    if w_zero is None:
        return total
    if isinstance(kernel, Conv):
        summed = kernel.dimension_numbers.rhs_spec[1:]
        x_sum = _multiply(kernel, left, jnp.ones_like(w))
    else:
        summed = list_axes(kernel, w.ndim).w_summed
        x_sum = reduce_rows(kernel, left, w.ndim, sum_up)
    terms = math.prod(w.shape[axis] for axis in summed)
    return total - w_zero * (x_sum - left_zero * terms)


def _multiply(kernel: Kernel, x: Array, w: Array) -> Array:
    if isinstance(kernel, Dot):
        left, right = (w, x) if kernel.swapped else (x, w)
        numbers = kernel.dimension_numbers
        return lax.dot_general(left, right, numbers, preferred_element_type=jnp.int32)
    return lax.conv_general_dilated(
        x,
        w,
        kernel.strides,
        "VALID",
        rhs_dilation=kernel.kernel_dilation,
        dimension_numbers=kernel.dimension_numbers,
        feature_group_count=kernel.groups,
        preferred_element_type=jnp.int32,
    )


def quantize(x: Array, grid: InputGrid) -> Array:
    """Returns `clip(round(x / scale) + zero_point, 0, top)`, uint8, as ONNX's QuantizeLinear."""
    steps = jnp.round(divide(x.astype(jnp.float32), grid.scale))
    codes = steps + grid.zero_point.astype(jnp.float32)
    return jnp.clip(codes, 0, grid.top.astype(jnp.float32)).astype(jnp.uint8)


def dequantize(codes: Array, grid: InputGrid) -> Array:
    """Returns the float32 numbers of input codes."""
    centred = codes.astype(jnp.int32) - grid.zero_point
    return exactly(centred.astype(jnp.float32) * grid.scale)


def to_float(total: Array, scale: Array) -> Array:
    """Returns the float32 numbers of int32 sums."""
    return exactly(total.astype(jnp.float32) * scale)


def exactly(product: Array) -> Array:
    """Returns a product, rounded before anything else is done with it.

    XLA joins a product and a sum into one operation with one rounding, and divides one factor where
    the product is to be divided. Neither `optimization_barrier` nor `reduce_precision` keeps it
    from that; a minimum does.
    """
    return jnp.minimum(product, LARGEST)


def divide(x: Array, scale: Array) -> Array:
    """Returns `x / scale` of a scalar, rounded once.

    XLA multiplies by the reciprocal of what is the same for every element, and so rounds twice;
    here it can't know that it is.
    """
    return x / jnp.where(x == x, scale, x)


def requantize(total: Array, scale: Array, grid: InputGrid, *, fixed_point: bool = False) -> Array:
    """Returns int32 sums at `scale` as the codes of the next input.

    By a float32 multiplier, or by integers alone: `multiply_fixed_point`.
    """
    multiplier = divide(scale, grid.scale)
    if fixed_point:
        steps = multiply_fixed_point(total, multiplier)
    else:
        steps = jnp.round(total.astype(jnp.float32) * multiplier).astype(jnp.int32)
    # Clipped before the zero point is added, as the sum could overflow.
    low, high = -grid.zero_point, grid.top - grid.zero_point
    return (jnp.clip(steps, low, high) + grid.zero_point).astype(jnp.uint8)


def fixed_point(multiplier: Array) -> tuple[Array, Array]:
    """Returns `(mantissa, shift)` with multiplier = mantissa · 2^(-31 - shift).

    These are M0 · 2^31 and n of arXiv:1712.05877, equation 6.

    Args:
      multiplier: float32, positive and below 2^30.

    Returns:
      int32 arrays of its shape; the mantissa in [2^30, 2^31), its last 7 bits 0.
    """
    fraction, exponent = jnp.frexp(multiplier)
    return (fraction * 2.0**24).astype(jnp.int32) << 7, -exponent


def multiply_fixed_point(total: Array, multiplier: Array) -> Array:
    """Returns int32 times float32, rounded to int32: a high product, then a rounding shift.

    `round(total · mantissa · 2^-31)` with halves up, then the shift with halves away from zero; a
    negative shift comes before the product and saturates. gemmlowp (fixedpoint/fixedpoint.h:
    SaturatingRoundingDoublingHighMul, RoundingDivideByPOT) and CMSIS-NN compute it so. Only the
    multiplier is a float, which is a constant of a model.
    """
    mantissa, shift = fixed_point(multiplier)
    left, right = jnp.maximum(-shift, 0), jnp.maximum(shift, 0)
    # A multiplier of 1 or more: shift to the left first, within int32.
    limit = jnp.right_shift(jnp.int32(2**31 - 1), left)
    total = jnp.left_shift(jnp.clip(total, -limit, limit), left)
    high = _high_product(total, mantissa)
    # Divide by 2^right. What is shifted out counts up if it is over a half; of a negative number,
    # whose shift rounds down, a half itself must stay down.
    mask = jnp.left_shift(jnp.int32(1), jnp.minimum(right, 31)) - 1
    remainder = jnp.bitwise_and(high, mask)
    threshold = jnp.right_shift(mask, 1) + (high < 0)
    steps = jnp.right_shift(high, jnp.minimum(right, 31)) + (remainder > threshold)
    return jnp.where(right > 31, 0, steps)


def _high_product(a: Array, b: Array) -> Array:
    """Returns `floor((a · b + 2^30) / 2^31)` of int32, without int64, which JAX may not have."""
    a_high, a_low = jnp.right_shift(a, 16), jnp.bitwise_and(a, 0xFFFF).astype(jnp.uint32)
    b_high, b_low = jnp.right_shift(b, 16), jnp.bitwise_and(b, 0xFFFF).astype(jnp.uint32)
    # a·b = a_high·b_high·2^32 + (a_high·b_low + a_low·b_high)·2^16 + a_low·b_low, each carried
    # upwards so that nothing overflows; low words are unsigned. (Hacker's Delight, section 8-2.)
    low = a_low * b_low
    first = a_high * b_low.astype(jnp.int32) + jnp.right_shift(low, 16).astype(jnp.int32)
    second = a_low.astype(jnp.int32) * b_high + jnp.bitwise_and(first, 0xFFFF)
    high = a_high * b_high + jnp.right_shift(first, 16) + jnp.right_shift(second, 16)
    low_word = jnp.left_shift(second.astype(jnp.uint32), 16) | jnp.bitwise_and(low, 0xFFFF)
    # Add 2^30 to the 64 bits (high, low_word), and take their bits 31 to 62.
    rounded = low_word + jnp.uint32(2**30)
    high = high + (rounded < low_word)
    return jnp.left_shift(high, 1) | jnp.right_shift(rounded, 31).astype(jnp.int32)
