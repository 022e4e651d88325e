"""Relative entropy in log space, by the convention 0 log 0 = 0: every KL of kdq's losses."""

import jax.numpy as jnp

from kdq.types import Array


def relative_entropy(log_a: Array, log_b: Array) -> Array:
    """Returns Σ a log(a / b) over the last axis, as the sum of a log(a / b) − a + b.

    A class with a = 0 (a logit of −inf, or far below the others) adds 0 whatever b is; one with
    a > 0 and b = 0 makes the sum +inf, with the gradient −a with respect to log b, which is finite.

    Args:
      log_a: [..., classes] float32, the logarithm of a distribution; −inf is probability 0.
      log_b: the same of the other one.

    Returns:
      [...] float32.
    """
    # The two extra terms sum to 0. With them no term is negative, so nothing cancels: at T = 20 and
    # logits of size 1 the plain sum is wrong by 1e-4. d + expm1(−d) is log(a / b) − 1 + b / a.
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    d = jnp.where(a == 0, 0, log_a - log_b)  # of two −inf the difference is NaN
    close = jnp.abs(d) < 1
    d_close = jnp.where(close, d, 0)  # expm1 of the others could overflow
    terms = jnp.where(close, a * (d_close + jnp.expm1(-d_close)), a * d - a + b)
    return jnp.sum(jnp.where(a == 0, b, terms), axis=-1)


def times_log(weight: Array, log_b: Array) -> Array:
    """Returns weight · log b, and 0 where both are 0; elementwise, of shapes that broadcast.

    Where weight > 0 and b = 0 it is −inf, with the gradient `weight` with respect to log b.
    """
    return weight * jnp.where((weight == 0) & jnp.isneginf(log_b), 0, log_b)
