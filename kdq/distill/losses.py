"""Distillation losses: pure functions of logits, one value an example, in log space."""

import jax
import jax.numpy as jnp

from kdq.types import Array


def kl(student_logits: Array, teacher_logits: Array, temperature: Array | float = 1.0) -> Array:
    """Softened Kullback-Leibler divergence from the teacher, T² KL(teacher ‖ student).

    With p = softmax(teacher_logits / T) and q = softmax(student_logits / T), this is
    T² Σ_c p_c (log p_c - log q_c). The factor T² keeps the size of the gradient when T changes, so
    callers must not multiply by it again. No gradient flows to the teacher. (Hinton et al., 2015,
    arXiv:1503.02531.)

    Args:
      student_logits: [batch..., classes], any float dtype; the arithmetic is float32.
      teacher_logits: the same shape.
      temperature: T > 0.

    Returns:
      [batch...] float32, at least 0 up to rounding; finite for logits of ±1e4.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {student_logits.shape} and teacher_logits {teacher_logits.shape} "
            "must have one shape"
        )
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    log_p = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    return jnp.square(jnp.asarray(temperature, jnp.float32)) * jnp.sum(
        jnp.exp(log_p) * (log_p - log_q), axis=-1
    )
