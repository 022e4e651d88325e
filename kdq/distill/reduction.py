"""Options, masks, checks of shapes and reductions, as all distillation losses have them."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from kdq.fields import Limits
from kdq.schema import COLD, HEAVIEST, HOT
from kdq.types import Array

# Types of the options that a config may set (`kdq.distill.term`), with their limits. The losses
# themselves take traced numbers, which nothing can check.
Scalar = Array | float
Temperature = Annotated[Scalar, Limits(at_least=COLD, at_most=HOT)]
Share = Annotated[Scalar, Limits(at_least=0, at_most=1)]
Weight = Annotated[Scalar, Limits(at_least=0, at_most=HEAVIEST)]
Momentum = Annotated[Scalar, Limits(at_least=0, below=1)]
Power = Annotated[Scalar, Limits(above=0, at_most=100)]
Variance = Annotated[Scalar, Limits(at_least=1e-30, at_most=HEAVIEST)]
Bits = Annotated[Scalar, Limits(at_least=1, at_most=8)]
Count = Annotated[int, Limits(at_least=1, at_most=2**31 - 1)]
Chunk = Annotated[int | None, Limits(at_least=1)]

_REDUCTIONS = ("none", "mean", "sum")


def on_logits(loss: Callable[..., Array], classes: int = 2) -> Callable[..., Array]:
    """Completes a loss of two outputs [batch..., classes], which is written without masks.

    It gets both in float32, with zeros where they are masked, and the teacher's without gradient;
    `mask` too if it names it. The result takes `mask` [batch...] and `reduction` (see `reduce`),
    and raises ValueError for unequal shapes, or fewer classes than `classes`.
    """

    def prepare(student: Array, teacher: Array, mask: Array | None) -> tuple[Array, Array]:
        if student.shape != teacher.shape:
            raise ValueError(
                f"student_logits {student.shape} and teacher_logits {teacher.shape} "
                "must have one shape"
            )
        check_classes(student, classes)
        if mask is not None:
            check_mask(mask, student.shape[:-1])
        student, teacher = (hide(x, mask).astype(jnp.float32) for x in (student, teacher))
        return student, jax.lax.stop_gradient(teacher)

    return _complete(loss, prepare)


def on_features(shared: int | None = None) -> Callable[[Callable[..., Array]], Callable]:
    """Completes a loss of two features [batch, ...], which is written without masks.

    As `on_logits` does, with a mask [batch]. The shapes must be equal up to `[:shared]`.
    """

    def prepare(student: Array, teacher: Array, mask: Array | None) -> tuple[Array, Array]:
        same_shape(student, teacher, "student", "teacher", shared=shared)
        return real(student, mask), jax.lax.stop_gradient(real(teacher, mask))

    return lambda loss: _complete(loss, prepare)


def _complete(loss: Callable[..., Array], prepare: Callable[..., tuple[Array, Array]]) -> Callable:
    sees_mask = "mask" in inspect.signature(loss).parameters

    @functools.wraps(loss)
    def complete(student, teacher, *args, mask=None, reduction="none", **options):
        student, teacher = prepare(student, teacher, mask)
        seen = {"mask": mask} if sees_mask else {}
        return reduce(loss(student, teacher, *args, **seen, **options), mask, reduction)

    return complete


def reduce(values: Array, mask: Array | None, reduction: str) -> Array:
    """Returns masked values [batch...] as they are or as one number, in their dtype.

    A masked value counts as 0 even if it is inf or NaN. Its gradient is only finite if the loss
    never saw the masked example, which is what `hide` is for.

    `mask` [batch...] is 1 for the examples that count and 0 for the others, any dtype; None counts
    all. "none" returns [batch...], "sum" the sum of the values that count, "mean" this sum divided
    by their number (by 1 if there are none). ValueError for another reduction, or mask's shape.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, given {reduction!r}")
    count = values.size
    if mask is not None:
        check_mask(mask, values.shape)
        mask = mask.astype(values.dtype)
        values = mask * jnp.where(mask > 0, values, 0)
        count = jnp.sum(mask)
    if reduction == "none":
        return values
    total = jnp.sum(values)
    return total if reduction == "sum" else total / jnp.maximum(count, 1)


def hide(examples: Array, mask: Array | None) -> Array:
    """Returns examples [batch..., features...] with zeros in place of those masked [batch...].

    So that no gradient flows to these. Zeros, not a factor of 0: one may hold inf or NaN. Raises
    ValueError for a mask whose shape is no leading part of theirs.
    """
    if mask is None:
        return examples
    check_mask(mask, examples.shape[: mask.ndim])
    return jnp.where(mask.reshape(mask.shape + (1,) * (examples.ndim - mask.ndim)) > 0, examples, 0)


def real(x: Array, mask: Array | None) -> Array:
    """Float32, with zeros for masked examples: no loss sees their values, not even a NaN."""
    if mask is not None:
        check_mask(mask, x.shape[:1])
    return hide(x.astype(jnp.float32), mask)


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


def check_mask(mask: Array, batch_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the mask has one entry for each example: shapes never broadcast."""
    if mask.shape != batch_shape:
        raise ValueError(f"mask must have the batch's shape {batch_shape}, given {mask.shape}")


def check_classes(logits: Array, least: int = 2) -> None:
    """Raises ValueError for logits [batch..., classes] of fewer than `least` classes."""
    if logits.ndim < 1 or logits.shape[-1] < least:
        raise ValueError(
            f"logits {logits.shape} must be [batch..., classes] of at least {least} classes: the "
            "softmax of one class is 1 whatever its logit, and every loss on it 0. Use soft_mse "
            "for outputs that are no classes; give a binary classifier two logits, 0 and its own"
        )


def same_shape(a: Array, b: Array, a_name: str, b_name: str, *, shared: int | None = None) -> None:
    """Raises ValueError, with both shapes, unless their first `shared` axes are equal."""
    if a.ndim == b.ndim == 0 or a.shape[:shared] != b.shape[:shared]:
        where = "one shape" if shared is None else f"one shape[:{shared}]"
        raise ValueError(f"{a_name} {a.shape} and {b_name} {b.shape} must have {where}")
