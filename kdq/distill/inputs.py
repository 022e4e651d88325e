"""Preparation of the arrays that losses on features compare."""

import jax
import jax.numpy as jnp

from kdq.distill import reduction
from kdq.types import Array


def pair(
    student: Array, teacher: Array, mask: Array | None, *, shared: int | None = None
) -> tuple[Array, Array]:
    """Both features in float32 with zeros for masked examples, the teacher's without gradient.

    Args:
      student: [batch, ...] float.
      teacher: [batch, ...] float.
      mask: [batch] of 0 and 1, or None.
      shared: `student.shape[:shared]` and `teacher.shape[:shared]` must be equal; None, the whole.

    Raises:
      ValueError: shapes that must be equal and are not.
    """
    same_shape(student, teacher, "student", "teacher", shared=shared)
    return real(student, mask), jax.lax.stop_gradient(real(teacher, mask))


def same_shape(a: Array, b: Array, a_name: str, b_name: str, *, shared: int | None = None) -> None:
    """Raises ValueError, with both shapes, unless their first `shared` axes are equal."""
    if a.ndim == b.ndim == 0 or a.shape[:shared] != b.shape[:shared]:
        where = "one shape" if shared is None else f"one shape[:{shared}]"
        raise ValueError(f"{a_name} {a.shape} and {b_name} {b.shape} must have {where}")


def real(x: Array, mask: Array | None) -> Array:
    """Float32, with zeros for masked examples: no loss sees their values, not even a NaN."""
    if mask is not None:
        reduction.check_mask(mask, x.shape[:1])
    return reduction.hide(x.astype(jnp.float32), mask)


def live(mask: Array | None, batch: int) -> Array:
    """The mask as [batch] float32; all ones for None."""
    return jnp.ones(batch) if mask is None else (mask > 0).astype(jnp.float32)


def unit(x: Array) -> Array:
    """Vectors along the last axis at Euclidean length 1; a zero vector, and its gradient, stay 0.

    Scaled by the largest element first, so that no square over- or underflows. The scale may be
    taken for a constant in the gradient: the result does not depend on it.
    """
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    # The reciprocal of a subnormal number would be infinite.
    empty = size < jnp.finfo(jnp.float32).tiny
    x = jnp.where(empty, 0.0, x) / jnp.where(empty, 1.0, size)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + empty)
