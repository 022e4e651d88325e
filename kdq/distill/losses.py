"""Losses on logits: pure functions, one value an example, in log space.

What all of them share:

- `student_logits` and `teacher_logits` are [batch..., classes] of one shape and any float dtype;
  the arithmetic is float32. No gradient flows to the teacher.
- p is the teacher's distribution and q the student's, softmax(logits / temperature). Every loss
  that has a temperature T > 0 carries the factor T², which keeps the size of its gradient when T
  changes (arXiv:1503.02531), whether or not its own paper writes it: never multiply by it again.
- Numeric options may be traced: they are data, and one compiled step serves all their values.
- A keyword `mask` [batch...] is 1 for the examples that count and 0 for the others. These have
  value 0 and no influence on the rest, not even through the statistics of the batch, whatever they
  hold.
- A keyword `reduction` is "none" for [batch...] float32, "sum", or "mean": over the examples that
  count.
- Values and gradients are finite for logits of ±1e4.
- A logit of −inf is a class that an output rules out: its probability is 0, and 0 log 0 = 0, so a
  class that both rule out counts for nothing. Where a loss asks the student for mass that it rules
  out (`kl` where only the student does, `reverse_kl` where only the teacher does, `cross_entropy`
  of such a label or with smoothing over such a class) the value is +inf, which is right: training
  then stops and says so. An output with no class left, a logit of +inf and NaN make it NaN.
- ValueError for unequal shapes (nothing is broadcast), a mask of another shape than [batch...], an
  unknown reduction, and, but for `soft_mse`, fewer than two classes: a softmax of one is always 1.
"""

import functools

import jax
import jax.numpy as jnp

from kdq import entropy
from kdq.distill import reduction as reductions
from kdq.distill.reduction import Scalar, Share, Temperature, Weight, on_logits
from kdq.entropy import nan_if_no_class, one_hot, relative_entropy
from kdq.types import Array

# Deviations below this part of a vector's own size are float32 rounding: the vector is constant.
_ROUNDING = 1e-6
# Of the deviations in a correlation: inverted, those of classes that never occur would overflow.
_SMALLEST_NORM = 1e-8


@on_logits
def kl(student_logits: Array, teacher_logits: Array, temperature: Temperature = 1.0) -> Array:
    """Softened Kullback-Leibler divergence from the teacher: T² KL(p ‖ q) = T² Σ p log(p / q).

    At least 0, in nats at T = 1. (Hinton et al., 2015, arXiv:1503.02531.)
    """
    log_q, log_p = _soften(student_logits, teacher_logits, temperature)
    return square(temperature) * relative_entropy(log_p, log_q)


@on_logits
def reverse_kl(
    student_logits: Array, teacher_logits: Array, temperature: Temperature = 1.0
) -> Array:
    """The divergence the other way round, T² KL(q ‖ p): the student may leave out modes.

    (MiniLLM, arXiv:2306.08543, where T = 1.)
    """
    log_q, log_p = _soften(student_logits, teacher_logits, temperature)
    return square(temperature) * relative_entropy(log_q, log_p)


@on_logits
def jensen_shannon(
    student_logits: Array,
    teacher_logits: Array,
    temperature: Temperature = 1.0,
    beta: Share = 0.5,
) -> Array:
    """Generalized Jensen-Shannon divergence, T² (β KL(p ‖ m) + (1 − β) KL(q ‖ m)).

    m = β p + (1 − β) q with β in [0, 1]. At β = 0 and β = 1 the formula is 0 for every student;
    there the value is `kl` and `reverse_kl`, the limits of the loss divided by β and by 1 − β, as
    the paper's gradients behave and common implementations do. So the loss jumps at both ends. NaN
    for other β; the derivative in β at the ends counts as 0. (GKD, arXiv:2306.13649, where T = 1.)
    """
    log_q, log_p = _soften(student_logits, teacher_logits, temperature)
    beta = jnp.asarray(beta, jnp.float32)
    log_m = _log_mixture(log_p, log_q, beta)
    # At the ends m is q or p, and the divergence that does not vanish counts whole.
    value = jnp.where(beta == 0, 1, beta) * relative_entropy(log_p, log_m)
    value += jnp.where(beta == 1, 1, 1 - beta) * relative_entropy(log_q, log_m)
    return square(temperature) * value


@on_logits
def skew_kl(
    student_logits: Array,
    teacher_logits: Array,
    temperature: Temperature = 1.0,
    alpha: Share = 0.1,
) -> Array:
    """Skew divergence T² KL(p ‖ α p + (1 − α) q), at most T² log(1 / α): a bounded `kl`.

    α in [0, 1], NaN for other α. α = 0 is `kl` at the same temperature, α = 1 is 0; the derivative
    in α at these two counts as 0. (DistiLLM, arXiv:2402.03898, where T = 1.)
    """
    log_q, log_p = _soften(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(log_p, log_q, jnp.asarray(alpha, jnp.float32))
    return square(temperature) * relative_entropy(log_p, log_m)


@on_logits
def dkd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    temperature: Temperature = 1.0,
    alpha: Weight = 1.0,
    beta: Weight = 8.0,
) -> Array:
    """Decoupled distillation, T² (α TCKD + β NCKD).

    TCKD is the divergence of the two-way distributions (p_label, 1 − p_label), NCKD that of the
    distributions over the other classes alone; α = 1 and β = 1 − p_label would give `kl`. Where the
    teacher rules out all the others, NCKD is 0: it says nothing of them.

    labels: [batch...] int in [0, classes). One outside makes its value NaN, unless masked. The
    paper's linear warm-up is a schedule of this loss's weight, so it is not in here. ValueError for
    labels of another shape or no integer dtype. (Zhao et al., arXiv:2203.08679.)
    """
    is_label = one_hot(labels, student_logits.shape)
    binary_q, others_q = _decouple(student_logits / temperature, is_label)
    binary_p, others_p = _decouple(teacher_logits / temperature, is_label)
    others = jnp.where(jnp.isneginf(others_p).all(-1), 0, relative_entropy(others_p, others_q))
    value = alpha * relative_entropy(binary_p, binary_q) + beta * others
    return square(temperature) * nan_if_no_class(value, is_label)


@on_logits
def dist(
    student_logits: Array,
    teacher_logits: Array,
    temperature: Temperature = 1.0,
    beta: Weight = 1.0,
    gamma: Weight = 1.0,
    *,
    mask: Array | None = None,
) -> Array:
    """Correlation with a stronger teacher, T² (β inter + γ intra); "mean" is the paper's loss.

    inter is 1 − ρ(q, p) over the classes of one example, with Pearson's ρ. intra is the mean over
    the classes of 1 − ρ of that class's probabilities over all examples that count; it belongs to
    the batch and is added to each example. The factor T² is in the authors' code; the paper's
    equations have no T. That code adds 1e-8 to the product of the norms, which moves the loss at
    T = 20 by 6e-5 of itself; here only a norm below 1e-8 counts as 1e-8, and else ρ is exact.

    ρ is 0, without gradient, where either side is constant up to rounding: equal logits, or a class
    that has the same probability everywhere. With fewer than two examples that count, intra is
    undefined and counts as 0. (Huang et al., arXiv:2205.10536.)
    """
    q = jax.nn.softmax(student_logits / temperature)
    p = jax.nn.softmax(teacher_logits / temperature)
    classes = q.shape[-1]
    inter = 1 - _pearson(q, p, jnp.ones(classes))
    examples = jnp.ones(inter.size) if mask is None else mask.astype(jnp.float32).reshape(-1)
    columns = [v.reshape(-1, classes).T for v in (q, p)]
    intra = jnp.mean(1 - _pearson(*columns, examples))
    intra = jnp.where(jnp.sum(examples) > 1, intra, 0)
    return square(temperature) * (beta * inter + gamma * intra)


@on_logits
def standardized_kl(
    student_logits: Array, teacher_logits: Array, temperature: Temperature = 1.0
) -> Array:
    """T² KL of standardized logits: `kl` of z = (logits − mean) / std, each over its classes.

    T is the paper's base temperature. std is the root of the mean squared deviation, as in the
    paper; its code divides by classes − 1, which equals a T larger by √(classes / (classes − 1)) in
    the softmax. Equal logits have z = 0 without gradient. A class that an output rules out is left
    out of its mean and std, and stays −inf. (Sun et al., arXiv:2403.01427.)
    """
    return kl(_standardize(student_logits), _standardize(teacher_logits), temperature)


@functools.partial(on_logits, classes=1)
def soft_mse(student_logits: Array, teacher_logits: Array) -> Array:
    """Squared difference of the logits themselves, averaged over classes; no temperature.

    Unlike the losses on distributions it sees a shift of all logits, and takes outputs of one
    class. One that both rule out (−inf) is left out of the mean. (Kim et al., arXiv:2105.08919.)
    """
    neither = jnp.isneginf(student_logits) & jnp.isneginf(teacher_logits)
    difference = jnp.where(neither, 0, student_logits) - jnp.where(neither, 0, teacher_logits)
    count = jnp.maximum(jnp.sum(~neither, axis=-1), 1)
    return jnp.sum(jnp.square(difference), axis=-1) / count


@on_logits
def hard_label(student_logits: Array, teacher_logits: Array) -> Array:
    """Cross-entropy with the class that the teacher predicts, the first of its largest logits.

    (DeiT's hard-label distillation, arXiv:2012.12877.)
    """
    # argmax takes a NaN for the maximum: a teacher that predicts nothing predicts no class.
    predicts = jnp.isfinite(jnp.max(teacher_logits, axis=-1))
    predicted = jnp.where(predicts, jnp.argmax(teacher_logits, axis=-1), -1)
    return cross_entropy(student_logits, predicted)


def cross_entropy(
    logits: Array,
    labels: Array,
    label_smoothing: Scalar = 0.0,
    *,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """The task loss, −Σ y log q with y = (1 − ε) onehot(label) + ε / classes, in nats.

    ε is `label_smoothing` in [0, 1] (arXiv:1512.00567). labels: [batch...] int in [0, classes); one
    outside makes its value NaN, unless masked. ValueError for labels of another shape or no integer
    dtype.
    """
    reductions.check_classes(logits)
    if mask is not None:
        reductions.check_mask(mask, logits.shape[:-1])
    visible = reductions.hide(logits, mask).astype(jnp.float32)
    value = entropy.cross_entropy(visible, labels, label_smoothing)
    return reductions.reduce(value, mask, reduction)


def square(temperature: Scalar) -> Array:
    """Returns T² in float32, of a number or an array."""
    return jnp.square(jnp.asarray(temperature, jnp.float32))


def _soften(student: Array, teacher: Array, temperature: Scalar) -> tuple[Array, Array]:
    """Returns log q and log p."""
    return jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)


def _log_mixture(log_p: Array, log_q: Array, weight: Array) -> Array:
    """log(weight p + (1 − weight) q), exactly log q at 0 and log p at 1."""
    inside = jnp.where((weight == 0) | (weight == 1), 0.5, weight)  # log 0 has no derivative
    neither = jnp.isneginf(log_p) & jnp.isneginf(log_q)  # nor has the sum of two zeros
    log_p, log_q = (jnp.where(neither, 0, v) for v in (log_p, log_q))
    mixed = jnp.logaddexp(jnp.log(inside) + log_p, jnp.log1p(-inside) + log_q)
    mixed = jnp.where(weight == 0, log_q, jnp.where(weight == 1, log_p, mixed))
    return jnp.where(neither, -jnp.inf, mixed)


def _decouple(scaled: Array, is_label: Array) -> tuple[Array, Array]:
    """Log-probabilities of (label, any other) [batch..., 2] and among the others.

    The latter are [batch..., classes], −inf in the label's place.
    """
    label = jnp.sum(jnp.where(is_label, scaled, 0), axis=-1)
    others = jnp.where(is_label, -jnp.inf, scaled)
    # The logsumexp of nothing has no gradient.
    any_other = ~jnp.isneginf(others).all(-1)
    rest = jax.nn.logsumexp(jnp.where(any_other[..., None], others, 0), axis=-1)
    among_others = others - rest[..., None]
    rest = jnp.where(any_other, rest, -jnp.inf)
    return jax.nn.log_softmax(jnp.stack([label, rest], axis=-1)), among_others


def _pearson(a: Array, b: Array, weights: Array) -> Array:
    """Correlation over the last axis, with weights [last]; 0 where a or b is constant."""
    count = jnp.maximum(jnp.sum(weights), 1)

    # Constant are sums of squares at most so large, which a NaN is not: it stays one.
    def deviations(v: Array) -> tuple[Array, Array, Array]:
        centered = v - jnp.sum(weights * v, axis=-1, keepdims=True) / count
        squares = jnp.sum(weights * jnp.square(centered), axis=-1)
        constant = squares <= _ROUNDING**2 * jnp.sum(weights * jnp.square(v), axis=-1)
        return centered, jnp.sqrt(jnp.maximum(squares, _SMALLEST_NORM**2)), constant

    (a, norm_a, a_constant), (b, norm_b, b_constant) = deviations(a), deviations(b)
    product = jnp.sum(weights * a * b, axis=-1)
    return jnp.where(a_constant | b_constant, 0, product / (norm_a * norm_b))


def _standardize(logits: Array) -> Array:
    """[batch..., classes] with mean 0 and population variance 1 over the classes not at −inf."""
    possible = ~jnp.isneginf(logits)
    logits = jnp.where(possible, logits, 0)
    count = jnp.maximum(jnp.sum(possible, axis=-1, keepdims=True), 1)
    mean = lambda v: jnp.sum(v, axis=-1, keepdims=True) / count
    centered = jnp.where(possible, logits - mean(logits), 0)
    variance = mean(jnp.square(centered))
    constant = variance <= _ROUNDING**2 * mean(jnp.square(logits))
    standard = jnp.where(constant, 0, centered / jnp.sqrt(jnp.where(constant, 1, variance)))
    return jnp.where(possible, standard, -jnp.inf)
