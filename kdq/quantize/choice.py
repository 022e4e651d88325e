"""Which code stands for a number: the nearest, or by chance one of the two about it."""

import jax
import jax.numpy as jnp

from kdq.types import Array


def nearest(x: Array, levels: Array | None) -> Array:
    """Index of the level nearest to each element, as float32; of two equally near, the even one.

    Without `levels` they are the whole numbers. Even counts from the level 0, as the last bit of a
    float's mantissa does.
    """
    if levels is None:
        return jnp.round(x)
    between = (levels[1:] + levels[:-1]) / 2
    below, above = (jnp.searchsorted(between, x, side=side) for side in ("left", "right"))
    zero = jnp.argmin(jnp.abs(levels))
    return jnp.where((below - zero) % 2 == 0, below, above).astype(jnp.float32)


def by_chance(x: Array, levels: Array | None, key: Array) -> Array:
    """Index of one of the two levels about each element, as float32, so that its mean is `x`.

    The upper one has the probability (x - lower) / (upper - lower), to 2⁻²³ (arXiv:1502.02551);
    what is a level itself stays. Without `levels` they are the whole numbers. Beyond the outermost
    level it is that one.
    """
    if levels is None:
        below = jnp.floor(x)
        share = x - below
    else:
        index = jnp.clip(jnp.searchsorted(levels, x, side="right") - 1, 0, len(levels) - 2)
        share = (x - levels[index]) / (levels[index + 1] - levels[index])
        below = index.astype(jnp.float32)
    # Not floor(x + u): the sum rounds, and pushes some whole numbers up.
    return below + (jax.random.uniform(key, x.shape) < share)
