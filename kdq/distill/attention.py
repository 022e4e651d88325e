"""Losses on the layers of transformers: how tokens attend to each other, and what they hold."""

import math

import jax
import jax.numpy as jnp

from kdq.distill import inputs
from kdq.distill.reduction import reduce
from kdq.types import Array


def attention_relation(
    student_query: Array,
    student_key: Array,
    teacher_query: Array,
    teacher_key: Array,
    *,
    token_mask: Array | None = None,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """Divergence of the student's relations between tokens from the teacher's (MiniLM).

    KL(softmax(Q' K'ᵀ / √width') ‖ softmax(Q Kᵀ / √width)) in nats, primes the teacher's, mean over
    heads and tokens (arXiv:2002.10957). The relation of values is that of the values given twice,
    for query and key. Padded tokens neither attend nor are attended to, and are not counted.

    Args:
      student_query: [batch, heads, tokens, width] float.
      student_key: the same shape.
      teacher_query: [batch, heads, tokens, teacher's width] float, with as many heads.
      teacher_key: the same shape.
      token_mask: [batch, tokens] of 0 and 1, 0 for padding.
      mask: [batch] of 0 and 1.
      reduction: "none", "mean" or "sum".

    Returns:
      [batch] float32, or a scalar; 0 for an example that is all padding.

    Raises:
      ValueError: shapes that do not fit together.
    """
    inputs.same_shape(student_query, student_key, "student_query", "student_key")
    inputs.same_shape(teacher_query, teacher_key, "teacher_query", "teacher_key")
    inputs.same_shape(student_query, teacher_query, "student_query", "teacher_query", shared=-1)
    if student_query.ndim != 4:
        raise ValueError(
            f"student_query {student_query.shape} must be [batch, heads, tokens, width]"
        )
    batch, heads, tokens, _ = student_query.shape
    present = _token_mask(token_mask, (batch, tokens))
    at_keys, at_queries = present[:, None, None, :], present[:, None, :, None]

    def log_relation(query, key):
        query, key = (jnp.where(at_queries, inputs.real(x, mask), 0.0) for x in (query, key))
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, precision="highest")
        # Not -inf, whose difference from itself is NaN.
        scores = jnp.where(at_keys, scores / math.sqrt(query.shape[-1]), _EXCLUDED)
        return jax.nn.log_softmax(scores)

    log_q = log_relation(student_query, student_key)
    log_p = jax.lax.stop_gradient(log_relation(teacher_query, teacher_key))
    # Padding adds nothing: as a key its p is 0, as a query (of zeros) both relations are uniform.
    terms = jnp.exp(log_p) * (log_p - log_q)
    values = terms.sum((1, 2, 3)) / (heads * _count(present))
    return reduce(values, mask, reduction)


def hidden_states(
    student: Array,
    teacher: Array,
    *,
    token_mask: Array | None = None,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """Mean squared difference of hidden states, over tokens that are no padding (TinyBERT).

    Each example counts the same, however many tokens it has (arXiv:1909.10351).

    Args:
      student: [batch, tokens, width] float, already of the teacher's width.
      teacher: the same shape.
      token_mask: [batch, tokens] of 0 and 1, 0 for padding.
      mask: [batch] of 0 and 1.
      reduction: "none", "mean" or "sum".

    Returns:
      [batch] float32, or a scalar; 0 for an example that is all padding.

    Raises:
      ValueError: two shapes.
    """
    student, teacher = inputs.pair(student, teacher, mask)
    if student.ndim != 3:
        raise ValueError(f"student {student.shape} must be [batch, tokens, width]")
    present = _token_mask(token_mask, student.shape[:2])
    # Before the difference: padding may hold inf or NaN.
    student, teacher = (jnp.where(present[..., None], x, 0.0) for x in (student, teacher))
    squares = jnp.square(student - teacher).sum((1, 2))
    return reduce(squares / (_count(present) * student.shape[-1]), mask, reduction)


_EXCLUDED = -1e30


def _token_mask(token_mask: Array | None, shape: tuple[int, int]) -> Array:
    """[batch, tokens] bool."""
    if token_mask is None:
        return jnp.ones(shape, bool)
    if token_mask.shape != shape:
        raise ValueError(f"token_mask {token_mask.shape} must have the shape {shape}")
    return token_mask > 0


def _count(present: Array) -> Array:
    return jnp.maximum(present.sum(-1), 1).astype(jnp.float32)
