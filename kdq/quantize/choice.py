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
    return below + (_uniform(key, x.shape) < share)


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform numbers in [0, 1], at a quarter of the price of `jax.random.uniform`.

    Each has 8 random bits of its own, above a fraction that all of them share. So each by itself is
    uniform to 2⁻²⁴; what they share moves the mean over a tensor by less than 1/256, and that only
    where all of its elements lie at the same place between two levels.
    """
    *rows, columns = shape or (1,)
    of_each, of_all = jax.random.split(key)
    words = jax.random.bits(of_each, (*rows, -(-columns // 4)), jnp.uint32)
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*rows, -1)
    first = octets[..., :columns].reshape(shape)
    return (first + jax.random.uniform(of_all)) / 256
