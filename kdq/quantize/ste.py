"""Rounding that can be trained through: one definition for weights and activations alike."""

import jax
import jax.numpy as jnp

from kdq.quantize import grid
from kdq.quantize.grid import Quantizer
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
    return _round(x, grid.resolve(x, quantizer))


def transformed(x: Array, quantizer: Quantizer) -> Array:
    """Returns what is rounded in place of `x`: `x` itself, or in training its tanh over the grid.

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


@jax.custom_vjp
def _round(x: Array, quantizer: Quantizer) -> Array:
    return _forward(x, quantizer)[0]


def _forward(x, quantizer):
    # Plain: neither a format of the scale nor a method of training takes part in rounding.
    y = grid.from_codes(grid.to_codes(x, quantizer), quantizer)
    scale, zero_point, levels = quantizer.scale, quantizer.zero_point, quantizer.levels
    if levels is None:
        codes = jnp.round(grid.position(x, scale, zero_point))
        inside = (codes >= quantizer.qmin) & (codes <= quantizer.qmax)
    else:
        relative = grid.position(x, scale, jnp.float32(0))
        inside = (relative >= levels[0]) & (relative <= levels[-1])
    # (q - v) * scale inside, (clip(q) - zero_point) * scale outside. 0 · ∞ is NaN, so that clipping
    # does not hide an infinite x from a training step.
    clipped_only = quantizer.training.scale_gradient == "clipped"
    error = jnp.where(inside, 0, y) if clipped_only else y - jnp.where(inside, x, 0 * x)
    return y.astype(x.dtype), (error, inside, quantizer)


def _backward(residuals, g):
    error, inside, quantizer = residuals
    training, scale, qmax = quantizer.training, quantizer.scale, quantizer.qmax
    dx = jnp.where(inside, g, 0)
    g32 = g.astype(jnp.float32)
    d_scale = grid.reduce_to(g32 * error, scale.shape) / scale
    if training.gradient_scale:
        d_scale = d_scale / jnp.sqrt(error.size / scale.size * jnp.maximum(qmax, 1))
    if training.decay:
        d_scale = d_scale + training.decay * jnp.square(qmax) * scale
    clipped = jnp.where(inside, 0, g32) * grid.expand(scale, g.shape)
    d_zero = -grid.reduce_to(clipped, quantizer.zero_point.shape)
    if training.elementwise:
        steps = error * grid.expand(1.0 / scale, g.shape)
        dx = (dx * (1 - training.elementwise * jnp.sign(g32) * steps)).astype(dx.dtype)
    fixed = dict.fromkeys(("qmin", "qmax", "levels", "key"))
    return dx, quantizer.replace(scale=d_scale, zero_point=d_zero, **fixed)


_round.defvjp(_forward, _backward)
