"""Rounding that can be trained through: one definition for weights and activations alike."""

import jax
import jax.numpy as jnp

from kdq.quantize.grid import expand, reduce_to
from kdq.types import Array


@jax.custom_vjp
def fake_quantize(x: Array, scale: Array, zero_point: Array, qmin: Array, qmax: Array) -> Array:
    """`x` rounded to the nearest number that a code stands for; exact halves go to the even code.

    `(clip(round(x / scale + zero_point), qmin, qmax) - zero_point) * scale`.

    Gradients treat the rounding as the identity (straight-through, arXiv:1308.3432). With
    `v = x / scale + zero_point` and `q = round(v)`, where `qmin <= q <= qmax`:
    d/dx = 1, d/dscale = q - v, d/dzero_point = 0; outside, where the grid clips:
    d/dx = 0, d/dscale = clip(q) - zero_point, d/dzero_point = -scale. The second is the
    learned-step-size gradient (LSQ, arXiv:1902.08153), here without its scale factor, which an
    optimizer that normalizes gradients would cancel. A scale that is not trained costs nothing
    under `jit`: its gradient is never computed.

    Args:
      x: tensor of any shape, float32 or bfloat16; the arithmetic is float32.
      scale: positive; shape as in `kdq.quantize.grid`.
      zero_point: like `scale`; the code of 0.
      qmin: scalar, the smallest code.
      qmax: scalar, the largest code.

    Returns:
      An array of the shape and dtype of `x`.
    """
    return _forward(x, scale, zero_point, qmin, qmax)[0]


def _position(x: Array, scale: Array, zero_point: Array) -> tuple[Array, Array, Array]:
    """`x` in units of codes, with the expanded scale and zero point."""
    # A reciprocal of the small array and a product over the large one: division does not vectorize
    # as well.
    inverse = expand(1.0 / scale, x.shape)
    zero_point = expand(zero_point, x.shape)
    return x.astype(jnp.float32) * inverse + zero_point, expand(scale, x.shape), zero_point


def _forward(x, scale, zero_point, qmin, qmax):
    position, wide_scale, wide_zero = _position(x, scale, zero_point)
    codes = jnp.clip(jnp.round(position), qmin, qmax)
    y = ((codes - wide_zero) * wide_scale).astype(x.dtype)
    return y, (x, scale, zero_point, qmin, qmax)


def _backward(residuals, g):
    x, scale, zero_point, qmin, qmax = residuals
    position, wide_scale, wide_zero = _position(x, scale, zero_point)
    codes = jnp.round(position)
    inside = (codes >= qmin) & (codes <= qmax)
    clipped = jnp.clip(codes, qmin, qmax)
    g32 = g.astype(jnp.float32)
    d_scale = reduce_to(g32 * (clipped - jnp.where(inside, position, wide_zero)), scale.shape)
    d_zero = reduce_to(jnp.where(inside, 0.0, -g32 * wide_scale), zero_point.shape)
    return jnp.where(inside, g, 0), d_scale, d_zero, None, None


fake_quantize.defvjp(_forward, _backward)
