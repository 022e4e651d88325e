"""Losses on the relations between the examples of a batch: similarities, distances, angles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdq.distill import inputs
from kdq.distill.options import Chunk
from kdq.distill.reduction import reduce
from kdq.types import Array


def similarity_preserving(
    student: Array, teacher: Array, *, mask: Array | None = None, reduction: str = "none"
) -> Array:
    """Squared difference of the normalized similarities within the batch (arXiv:1907.09682).

    G = F Fᵀ of the flattened features, each row divided by its Euclidean norm. The value of
    example i is Σ_j (G_ij - G'_ij)² / n over the n examples that count, so that "mean" is the
    paper's ‖G - G'‖²_F / n².

    Args:
      student: [batch, ...] float.
      teacher: [batch, ...] float, of any other axes.
      mask: [batch] of 0 and 1.
      reduction: "none", "mean" or "sum".

    Returns:
      [batch] float32, or a scalar.

    Raises:
      ValueError: two batch sizes.
    """
    student, teacher = inputs.pair(student, teacher, mask, shared=1)
    weights = inputs.live(mask, student.shape[0])
    similarities = (inputs.unit(_products(x, x)) for x in map(_flat, (student, teacher)))
    squares = jnp.square(next(similarities) - next(similarities))
    return reduce(jnp.sum(squares, axis=-1) / _count(weights), mask, reduction)


def relational_distance(
    student: Array,
    teacher: Array,
    chunk: Chunk = None,
    *,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """Huber loss on the distances between examples (RKD-D, arXiv:1904.05068).

    Distances are Euclidean, of the flattened features, and divided by their mean over all pairs of
    two examples (coinciding ones too), student's and teacher's apart; the student's mean carries
    gradient. The value of example i is the mean of its Huber losses (δ = 1) over all n examples
    that count. As in the authors' code that includes itself, a zero: "mean" divides the sum over
    pairs by n², where the paper's equation says the sum. The gradient at a distance of 0 is 0.

    Memory grows with batch² × features, or with batch × chunk × features.

    Args:
      student: [batch, ...] float.
      teacher: [batch, ...] float, of any other axes.
      chunk: how many examples to compare with all others at a time, the rest after them; None,
        half of them. The result is the same. Static.
      mask: [batch] of 0 and 1.
      reduction: "none", "mean" or "sum".

    Returns:
      [batch] float32, or a scalar.

    Raises:
      ValueError: two batch sizes, or a chunk below 1.
    """
    student, teacher = inputs.pair(student, teacher, mask, shared=1)
    student, teacher = _flat(student), _flat(teacher)
    weights = inputs.live(mask, student.shape[0])
    count = _count(weights)
    if chunk is None:
        # The loop is a boundary: without one, XLA's CPU backend fuses into the pairs whatever made
        # the features, a convolution too, and computes it anew for each (97 times the step).
        chunk = -(-student.shape[0] // 2)

    def mean_distance(x):
        sums = _over_rows(lambda row: jnp.sum(weights * _distances(row, x)), x, chunk)
        mean = jnp.sum(weights * sums) / jnp.maximum(count * (count - 1), 1)
        return jnp.where(mean > 0, mean, 1.0)  # all examples coincide

    student_mean, teacher_mean = mean_distance(student), mean_distance(teacher)

    def compare(rows):
        student_row, teacher_row = rows
        distances = _distances(student_row, student) / student_mean
        targets = _distances(teacher_row, teacher) / teacher_mean
        return jnp.sum(weights * optax.losses.huber_loss(distances, targets))

    values = _over_rows(compare, (student, teacher), chunk) / count
    return reduce(values, mask, reduction)


def relational_angle(
    student: Array,
    teacher: Array,
    chunk: Chunk = None,
    *,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """Huber loss on the cosines of the angles that three examples form (RKD-A, arXiv:1904.05068).

    The cosine at example i between j and k is ⟨e_ij, e_ik⟩ with e_ij the unit vector from i to j,
    of the flattened features, and 0 where two coincide. The value of example i is the mean of the
    Huber losses (δ = 1) over all n² pairs j, k that count, where repeated examples add zeros; as
    in the authors' code, "mean" divides the sum over triplets by n³.

    Memory grows with batch³ + batch² × features, or with batch × (chunk + features); the gradient
    computes each cosine twice then.

    Args:
      student: [batch, ...] float.
      teacher: [batch, ...] float, of any other axes.
      chunk: for one example i at a time, how many j to compare with all k; None, all i and j at
        once. The result is the same. Static.
      mask: [batch] of 0 and 1.
      reduction: "none", "mean" or "sum".

    Returns:
      [batch] float32, or a scalar.

    Raises:
      ValueError: two batch sizes, or a chunk below 1.
    """
    student, teacher = inputs.pair(student, teacher, mask, shared=1)
    student, teacher = _flat(student), _flat(teacher)
    weights = inputs.live(mask, student.shape[0])

    def compare(anchors):
        units = [inputs.unit(x - row) for x, row in zip((student, teacher), anchors, strict=True)]

        def compare_side(sides):
            cosines, targets = (_products(x, row) for x, row in zip(units, sides, strict=True))
            return jnp.sum(weights * optax.losses.huber_loss(cosines, targets))

        return jnp.sum(weights * _over_rows(compare_side, tuple(units), chunk))

    one_by_one = None if chunk is None else 1
    values = _over_rows(compare, (student, teacher), one_by_one) / jnp.square(_count(weights))
    return reduce(values, mask, reduction)


def _over_rows(function: Callable[[Any], Array], rows: Any, chunk: int | None) -> Array:
    """`function` of each row, `chunk` rows at a time; of these the gradient keeps only the rows."""
    if chunk is None:
        return jax.vmap(function)(rows)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, or None, given {chunk}")
    return jax.lax.map(jax.checkpoint(function, prevent_cse=False), rows, batch_size=chunk)


def _distances(row: Array, x: Array) -> Array:
    """Returns distances [batch] of `row` [features] from each of `x` [batch, features]."""
    # Not by way of inner products: for points close together these cancel.
    squares = jnp.sum(jnp.square(x - row), axis=-1)
    apart = squares > 0  # the square root has no gradient at 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)


def _products(x: Array, y: Array) -> Array:
    """Inner products x yᵀ in full float32, which accelerators do not do unless told."""
    return jnp.matmul(x, y.T, precision="highest")


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _count(weights: Array) -> Array:
    return jnp.maximum(jnp.sum(weights), 1.0)
