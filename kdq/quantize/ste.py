"""Rounding that can be trained through: one definition for weights and activations alike."""

import jax
import jax.numpy as jnp

from kdq.quantize.grid import expand, from_codes, position, reduce_to, to_codes
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


def _forward(x, scale, zero_point, qmin, qmax):
    quantizer = {"scale": scale, "zero_point": zero_point, "qmin": qmin, "qmax": qmax}
    y = from_codes(to_codes(x, quantizer), quantizer)
    return y.astype(x.dtype), (x, y, scale, zero_point, qmin, qmax)


def _backward(residuals, g):
    x, y, scale, zero_point, qmin, qmax = residuals
    codes = jnp.round(position(x, scale, zero_point))
    dx = jnp.where((codes >= qmin) & (codes <= qmax), g, 0)
    # In units of the scale, q - v inside is y - x and clip(q) - zero_point outside is y: so the
    # whole sum is over products of arrays that the step has anyway.
    g32, dx32 = g.astype(jnp.float32), dx.astype(jnp.float32)
    d_scale = reduce_to(g32 * y - dx32 * x.astype(jnp.float32), scale.shape) / scale
    d_zero = reduce_to((dx32 - g32) * expand(scale, x.shape), zero_point.shape)
    return dx, d_scale, d_zero, None, None


fake_quantize.defvjp(_forward, _backward)
