"""Losses on intermediate features: pure functions, one value an example, in float32.

What all of them share:

- `student` and `teacher` are [batch, ...] float, of one shape (see `adapters`) unless it says
  otherwise. No gradient flows to the teacher, except where it says so.
- A keyword `mask` [batch] of 0 and 1: a masked example gives 0, and influences no other, not even
  by a mean, a range or a pair. A keyword `token_mask` [batch, tokens] is 0 for padding.
- A keyword `reduction`, "none" for [batch] float32, "sum" or "mean" for a scalar; "mean", over the
  examples that count, is the loss of the paper.
- ValueError for shapes that do not fit together.

Those that contrast examples with each other are in `contrast`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdq.distill.reduction import (
    Bits,
    Chunk,
    Power,
    Variance,
    live,
    on_features,
    real,
    reduce,
    same_shape,
    unit,
)
from kdq.quantize import grid
from kdq.types import Array

_EXCLUDED = -1e30


@on_features()
def hint(student: Array, teacher: Array) -> Array:
    """Mean squared difference of the features (FitNets, arXiv:1412.6550).

    The paper has half the squared norm of the difference; the mean is the same up to a constant,
    which makes weights comparable between layers.
    """
    return _example_mean(jnp.square(student - teacher))


@on_features(shared=-1)
def attention_transfer(student: Array, teacher: Array, power: Power = 2.0) -> Array:
    """Mean squared difference of the maps of activity, each of length 1 (arXiv:1612.03928).

    Features are [batch, positions..., channels], of any numbers of channels. The map of an example
    is Q = mean over channels of |a|^power, Q / ‖Q‖₂ over all positions; that of zeros is 0. A power
    (> 0) above 1 stresses the strongest activations. The value is the *mean* over positions of the
    squared difference, as in the authors' code; their equation has the norm of the difference.
    """
    if student.ndim < 3:
        raise ValueError(f"student {student.shape} must be [batch, positions..., channels]")

    def attention_map(x: Array) -> Array:
        # The map does not depend on the scale, and large features to a power would overflow.
        size = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), keepdims=True)
        size = jax.lax.stop_gradient(jnp.where(size < jnp.finfo(jnp.float32).tiny, 1.0, size))
        x = jnp.abs(x) / size
        zero = x == 0  # 0^p has no gradient in p, and none in 0 if p < 1
        raised = jnp.where(zero, 0.0, jnp.power(jnp.where(zero, 1.0, x), power))
        return unit(jnp.mean(raised, axis=-1).reshape(x.shape[0], -1))

    return _example_mean(jnp.square(attention_map(student) - attention_map(teacher)))


@on_features()
def variational_information(
    student_mean: Array, teacher: Array, raw_variance: Array, epsilon: Variance = 1e-5
) -> Array:
    """Negative log-likelihood of the teacher under a Gaussian around the student (VID).

    Mean over elements of ½ ((t - μ)² / σ² + log σ²), in nats and without the constant ½ log 2π,
    with μ = student_mean, the teacher's feature as predicted from the student's, and σ² =
    softplus(raw_variance) + epsilon (> 0) of [channels]: minus the variational bound on the mutual
    information, up to constants (arXiv:1904.05835). It can be negative. Gradients flow to
    `student_mean` and to `raw_variance`. The authors start at σ² = 5: raw_variance =
    log(expm1(5 - epsilon)).
    """
    if raw_variance.shape != teacher.shape[-1:]:
        raise ValueError(
            f"raw_variance {raw_variance.shape} must have the channels of teacher {teacher.shape}"
        )
    variance = jax.nn.softplus(raw_variance.astype(jnp.float32)) + epsilon
    nll = 0.5 * (jnp.square(teacher - student_mean) / variance + jnp.log(variance))
    return _example_mean(nll)


@on_features()
def quantized_feature(student: Array, teacher: Array, bits: Bits = 4) -> Array:
    """Mean squared difference from the teacher's feature, quantized (QFD, arXiv:2307.10638).

    The target is a uniform `bits`-bit rounding of the teacher's feature with one scale for the
    tensor: on the unsigned grid over [0, max] if nothing is negative (after a ReLU), else on the
    signed grid over ±max|t|; one bit is 0 and max, or ±max|t|. The range is that of the examples of
    this batch that count. The paper trains the range in a phase of its own and then freezes it; for
    that, give `hint` the rounded feature (`quantize.ste.fake_quantize`).
    """
    low, high = jnp.min(teacher), jnp.max(teacher)  # of masked examples zeros: within the range
    signed, unsigned = (grid.from_range(low, high, bits, signed=s) for s in (True, False))
    quantizer = jax.tree.map(lambda s, u: jnp.where(low < 0, s, u), signed, unsigned)
    target = grid.from_codes(grid.to_codes(teacher, quantizer), quantizer)
    return _example_mean(jnp.square(student - target))


@on_features()
def hidden_states(student: Array, teacher: Array, *, token_mask: Array | None = None) -> Array:
    """Mean squared difference of hidden states [batch, tokens, width] (TinyBERT, arXiv:1909.10351).

    Over tokens that are no padding; each example counts the same, however many it has, and 0 if it
    is all padding.
    """
    if student.ndim != 3:
        raise ValueError(f"student {student.shape} must be [batch, tokens, width]")
    present = _token_mask(token_mask, student.shape[:2])
    # Before the difference: padding may hold inf or NaN.
    student, teacher = (jnp.where(present[..., None], x, 0.0) for x in (student, teacher))
    squares = jnp.square(student - teacher).sum((1, 2))
    return squares / (_token_count(present) * student.shape[-1])


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
    heads and tokens (arXiv:2002.10957). All are [batch, heads, tokens, width], the teacher's of
    another width. The relation of values is that of the values given twice, for query and key.
    Padded tokens neither attend nor are attended to, and are not counted; an example that is all
    padding gives 0.
    """
    same_shape(student_query, student_key, "student_query", "student_key")
    same_shape(teacher_query, teacher_key, "teacher_query", "teacher_key")
    same_shape(student_query, teacher_query, "student_query", "teacher_query", shared=-1)
    if student_query.ndim != 4:
        raise ValueError(
            f"student_query {student_query.shape} must be [batch, heads, tokens, width]"
        )
    batch, heads, tokens, _ = student_query.shape
    present = _token_mask(token_mask, (batch, tokens))
    at_keys, at_queries = present[:, None, None, :], present[:, None, :, None]

    def log_relation(query, key):
        query, key = (jnp.where(at_queries, real(x, mask), 0.0) for x in (query, key))
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, precision="highest")
        # Not -inf, whose difference from itself is NaN.
        scores = jnp.where(at_keys, scores / math.sqrt(query.shape[-1]), _EXCLUDED)
        return jax.nn.log_softmax(scores)

    log_q = log_relation(student_query, student_key)
    log_p = jax.lax.stop_gradient(log_relation(teacher_query, teacher_key))
    # Padding adds nothing: as a key its p is 0, as a query (of zeros) both relations are uniform.
    terms = jnp.exp(log_p) * (log_p - log_q)
    return reduce(terms.sum((1, 2, 3)) / (heads * _token_count(present)), mask, reduction)


@on_features(shared=1)
def similarity_preserving(student: Array, teacher: Array, *, mask: Array | None = None) -> Array:
    """Squared difference of the normalized similarities within the batch (arXiv:1907.09682).

    G = F Fᵀ of the flattened features, of any shapes, each row divided by its Euclidean norm. The
    value of example i is Σ_j (G_ij - G'_ij)² / n over the n examples that count, so that "mean" is
    the paper's ‖G - G'‖²_F / n².
    """
    weights = live(mask, student.shape[0])
    similarities = (unit(_products(x, x)) for x in map(_flat, (student, teacher)))
    squares = jnp.square(next(similarities) - next(similarities))
    return jnp.sum(squares, axis=-1) / _count(weights)


@on_features(shared=1)
def relational_distance(
    student: Array, teacher: Array, chunk: Chunk = None, *, mask: Array | None = None
) -> Array:
    """Huber loss on the distances between examples (RKD-D, arXiv:1904.05068).

    Distances are Euclidean, of the flattened features (of any shapes), and divided by their mean
    over all pairs of two examples (coinciding ones too), student's and teacher's apart; the
    student's mean carries gradient. The value of example i is the mean of its Huber losses (δ = 1)
    over all n examples that count. As in the authors' code that includes itself, a zero: "mean"
    divides the sum over pairs by n², where the paper's equation says the sum. The gradient at a
    distance of 0 is 0.

    `chunk` (static, at least 1) examples are compared with all others at a time, None for half of
    them, with the same result: memory grows with batch × chunk × features.
    """
    student, teacher = _flat(student), _flat(teacher)
    weights = live(mask, student.shape[0])
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

    return _over_rows(compare, (student, teacher), chunk) / count


@on_features(shared=1)
def relational_angle(
    student: Array, teacher: Array, chunk: Chunk = None, *, mask: Array | None = None
) -> Array:
    """Huber loss on the cosines of the angles that three examples form (RKD-A, arXiv:1904.05068).

    The cosine at example i between j and k is ⟨e_ij, e_ik⟩ with e_ij the unit vector from i to j,
    of the flattened features (of any shapes), and 0 where two coincide. The value of example i is
    the mean of the Huber losses (δ = 1) over all n² pairs j, k that count, where repeated examples
    add zeros; as in the authors' code, "mean" divides the sum over triplets by n³.

    With `chunk` (static, at least 1), one i at a time and so many j are compared with all k; None
    is all at once, with the same result. Memory grows with batch³ + batch² × features, or with
    batch × (chunk + features); the gradient computes each cosine twice then.
    """
    student, teacher = _flat(student), _flat(teacher)
    weights = live(mask, student.shape[0])

    def compare(anchors):
        units = [unit(x - row) for x, row in zip((student, teacher), anchors, strict=True)]

        def compare_side(sides):
            cosines, targets = (_products(x, row) for x, row in zip(units, sides, strict=True))
            return jnp.sum(weights * optax.losses.huber_loss(cosines, targets))

        return jnp.sum(weights * _over_rows(compare_side, tuple(units), chunk))

    one_by_one = None if chunk is None else 1
    return _over_rows(compare, (student, teacher), one_by_one) / jnp.square(_count(weights))


def _example_mean(x: Array) -> Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _token_mask(token_mask: Array | None, shape: tuple[int, int]) -> Array:
    """[batch, tokens] bool."""
    if token_mask is None:
        return jnp.ones(shape, bool)
    if token_mask.shape != shape:
        raise ValueError(f"token_mask {token_mask.shape} must have the shape {shape}")
    return token_mask > 0


def _token_count(present: Array) -> Array:
    return jnp.maximum(present.sum(-1), 1).astype(jnp.float32)


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
