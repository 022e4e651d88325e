"""How far a quantized model's outputs are from a teacher's."""

from typing import Any

import jax
import jax.numpy as jnp

from kdq.entropy import relative_entropy
from kdq.types import Array


def kl(teacher_logits: Array, logits: Array) -> Array:
    """KL(p ‖ q) = Σ p log(p / q) in nats, [...] float32, of the softmax over the last axis.

    A logit of −inf is a class of probability 0: +inf where p has mass there and q has none.

    Args:
      teacher_logits: [..., classes] float; p is their softmax. No gradient flows to them.
      logits: [..., classes] float; q is their softmax.
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return relative_entropy(log_p, log_q)


def check_logits(name: str, what: str, logits: Any, like: tuple[int, ...] | None = None) -> None:
    """Raises ValueError unless `logits` is one float array, of the shape `like` if there is one."""
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", None)
    if not shape or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: {what} must be one float array of logits, not {type(logits)}")
    if like is not None and shape != like:
        raise ValueError(f"{name}: {what} have shape {shape}, the model's have {like}")
