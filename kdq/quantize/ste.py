"""Rounding that can be trained through: one definition for weights and activations alike."""

from functools import partial

import jax
import jax.numpy as jnp

from kdq.quantize import grid
from kdq.quantize.grid import Quantizer, Training
from kdq.types import Array


def fake_quantize(x: Array, quantizer: Quantizer) -> Array:
    """`x` rounded to the nearest number that a code stands for; exact halves go to the even code.

    `(clip(round(x / scale + zero_point), qmin, qmax) - zero_point) * scale`, or the nearest level.

    Gradients treat the rounding as the identity (straight-through, arXiv:1308.3432). With
    `v = x / scale + zero_point` and `q = round(v)`, where `qmin <= q <= qmax`:
    d/dx = 1, d/dscale = q - v, d/dzero_point = 0; outside, where the grid clips:
    d/dx = 0, d/dscale = clip(q) - zero_point, d/dzero_point = -scale. The second is the
    learned-step-size gradient (LSQ, arXiv:1902.08153), here without its scale factor, which an
    optimizer that normalizes gradients would cancel. A scale that is not trained costs nothing
    under `jit`: its gradient is never computed. `quantizer.training` changes these; see `Training`.

    With a `quantizer.key` an element goes up or down by chance, so that its mean is `x` wherever
    the grid reaches (arXiv:1502.02551). Gradients are the same, of the `y` that was drawn.

    Args:
      x: tensor of any shape, float32 or bfloat16; the arithmetic is float32.
      quantizer: see `Quantizer`; its arrays align with `x`, after the axes of a stack.

    Returns:
      An array of the shape and dtype of `x`.
    """
    return grid.over_stack(_one, quantizer)(x, quantizer)


def _one(x: Array, quantizer: Quantizer) -> Array:
    x = transformed(x, quantizer)
    q = grid.resolve(x, quantizer)
    return _round(x, q.scale, q.zero_point, q.qmin, q.qmax, q.levels, q.key, q.training)


def transformed(x: Array, quantizer: Quantizer) -> Array:
    """What is rounded in place of `x` while it trains: `x` itself, or its tanh over the grid.

    `reach · tanh(x) / max|tanh(x)|`, with `reach` half of what the grid spans (arXiv:1606.06160).
    The maximum is of the elements that share a scale, the whole tensor in the paper: so channels
    keep the ranges that they were calibrated to.
    """
    if not quantizer.training.transform:
        return x
    t = jnp.tanh(x)
    shape = quantizer.scale.shape
    top = grid.to_groups(jnp.abs(jax.lax.stop_gradient(t)), shape).max(-1).reshape(shape)
    reach = quantizer.scale * (quantizer.qmax - quantizer.qmin) / 2
    return (t * grid.expand(reach / jnp.where(top > 0, top, 1.0), x.shape)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _round(x, scale, zero_point, qmin, qmax, levels, key, training):
    return _forward(x, scale, zero_point, qmin, qmax, levels, key, training)[0]


def _forward(x, scale, zero_point, qmin, qmax, levels, key, training):
    quantizer = Quantizer(scale, zero_point, qmin, qmax, levels, key)
    y = grid.from_codes(grid.to_codes(x, quantizer), quantizer)
    return y.astype(x.dtype), (x, y, scale, zero_point, qmin, qmax, levels)


def _backward(training: Training, residuals, g):
    x, y, scale, zero_point, qmin, qmax, levels = residuals
    if levels is None:
        codes = jnp.round(grid.position(x, scale, zero_point))
        inside = (codes >= qmin) & (codes <= qmax)
    else:
        relative = grid.position(x, scale, jnp.float32(0))
        inside = (relative >= levels[0]) & (relative <= levels[-1])
    dx = jnp.where(inside, g, 0)
    # In units of the scale, q - v inside is y - x and clip(q) - zero_point outside is y: so the
    # whole sum is over products of arrays that the step has anyway.
    g32, dx32, x32 = (a.astype(jnp.float32) for a in (g, dx, x))
    moved = g32 - dx32 if training.scale_gradient == "clipped" else g32
    held = 0.0 if training.scale_gradient == "clipped" else dx32 * x32
    d_scale = grid.reduce_to(moved * y - held, scale.shape) / scale
    if training.gradient_scale:
        d_scale = d_scale / jnp.sqrt(x.size / scale.size * jnp.maximum(qmax, 1))
    if training.decay:
        d_scale = d_scale + training.decay * jnp.square(qmax) * scale
    d_zero = grid.reduce_to((dx32 - g32) * grid.expand(scale, x.shape), zero_point.shape)
    if training.elementwise:
        error = (x32 - y) * grid.expand(1.0 / scale, x.shape)
        dx = (dx32 * (1 + training.elementwise * jnp.sign(dx32) * error)).astype(dx.dtype)
    return dx, d_scale, d_zero, None, None, None, None


_round.defvjp(_forward, _backward)
