"""Entropies in log space, by the convention 0 log 0 = 0: every KL and cross-entropy of kdq."""

import jax
import jax.numpy as jnp
import numpy as np

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


def kl(reference_logits: Array, logits: Array) -> Array:
    """Returns KL(p ‖ q) = Σ p log(p / q) in nats, of the softmax over the last axis.

    A logit of −inf is a class of probability 0: +inf where p has mass there and q has none.

    Args:
      reference_logits: [..., classes] float; p is their softmax. No gradient flows to them.
      logits: [..., classes] float; q is their softmax.

    Returns:
      [...] float32.
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(reference_logits).astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return relative_entropy(log_p, log_q)


def times_log(weight: Array, log_b: Array) -> Array:
    """Returns weight · log b, and 0 where both are 0; elementwise, of shapes that broadcast.

    Where weight > 0 and b = 0 it is −inf, with the gradient `weight` with respect to log b.
    """
    return weight * jnp.where((weight == 0) & jnp.isneginf(log_b), 0, log_b)


def cross_entropy(logits: Array, labels: Array, label_smoothing: Array | float = 0.0) -> Array:
    """Returns −Σ y log q with y = (1 − ε) onehot(label) + ε / classes, in nats.

    Args:
      logits: [..., classes] float32 of q.
      labels: [...] int in [0, classes); one outside makes its value NaN.
      label_smoothing: ε in [0, 1] (arXiv:1512.00567).

    Returns:
      [...] float32.

    Raises:
      ValueError: labels of another shape, or that are no integers.
    """
    log_q = jax.nn.log_softmax(logits)
    is_label = one_hot(labels, logits.shape)
    of_label = jnp.sum(jnp.where(is_label, log_q, 0), axis=-1)
    value = -times_log(1 - label_smoothing, of_label)
    value -= times_log(label_smoothing, jnp.mean(log_q, axis=-1))
    return nan_if_no_class(value, is_label)


def one_hot(labels: Array, shape: tuple[int, ...]) -> Array:
    """Returns [..., classes] bool; all False where the label is no class.

    Raises ValueError for labels of another shape than that of the logits, or no integers.
    """
    if labels.shape != shape[:-1]:
        raise ValueError(f"labels must have the batch's shape {shape[:-1]}, given {labels.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, given {labels.dtype}")
    if isinstance(labels, np.ndarray):  # of 64 bits perhaps, of which JAX would keep 32
        labels = np.where((labels >= 0) & (labels < shape[-1]), labels, -1).astype(np.int32)
    return labels[..., None] == jnp.arange(shape[-1])


def nan_if_no_class(value: Array, is_label: Array) -> Array:
    """Returns values, NaN where `one_hot` is all False: traced code cannot raise."""
    return jnp.where(jnp.any(is_label, axis=-1), value, jnp.nan)
