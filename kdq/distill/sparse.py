"""A few classes an example in place of a teacher's whole output: how to choose them, and losses.

Two ways, for teachers with too many classes to store. The k largest (`top_k_targets`, `top_k_kl`)
are exact on what they keep; what is lost is a bias, which no number of epochs averages out. Sampled
classes (`sample_targets`, `sampled_kl`) are noisy and unbiased: the gradient's mean over the draws
is that of the dense `kdq.distill.losses.kl`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax

from kdq.data.transforms import random_uniform
from kdq.distill.losses import square
from kdq.distill.reduction import Temperature, check_classes, hide, reduce
from kdq.entropy import times_log
from kdq.types import Array

_SAMPLING = 2**32  # purpose in the random key; those of kdq.data are small, so no number is shared


def top_k_targets(logits: Array, k: int, temperature: Temperature) -> tuple[Array, Array]:
    """The k most probable classes of softmax(logits / T) and their log-probabilities.

    Logits are [n..., classes], k is 1 to classes (else ValueError). Returns indices int32
    [n..., k], the most probable first, and log p float32 [n..., k], normalized over all classes:
    what they lack is the mass of the tail. They fit this temperature alone. A class with the logit
    −inf has log p = −inf, and is only among them if there are fewer than k others.
    """
    check_classes(logits)
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"k must be 1 to {classes}, the number of classes; given {k}")
    log_p = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32) / temperature)
    log_probs, indices = jax.lax.top_k(log_p, k)
    return indices.astype(jnp.int32), log_probs


def top_k_kl(
    student_logits: Array,
    indices: Array,
    log_probs: Array,
    temperature: Temperature,
    tail: bool = True,
    *,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """T² KL from the teacher's k largest probabilities, with or without a bucket for the rest.

    With q = softmax(student_logits / T) and S the k classes, this is
    T² [Σ_{c in S} p_c log(p_c / q_c) + p_tail log(p_tail / q_tail)], where p_tail = 1 - Σ_S p_c and
    q_tail = Σ_{c not in S} q_c. It is zero for a student that equals the teacher, and for any other
    with the same S and tail mass: how the tail is shared out is not taught. Logits of −inf are as
    in `kdq.distill.losses`: +inf where the teacher has mass that the student rules out.

    With `tail=False` it is the plain truncated form, T² Σ_S p'_c log(p'_c / q_c) with
    p'_c = p_c / Σ_S p. This one is biased: its optimum is q = p', which has no tail at all, and at
    q = p its gradient is T (p - p'), not 0. It is here to show that (arXiv:2503.16870).

    Logits are [batch..., classes], the arithmetic float32; `indices` [batch..., k] int, no class
    twice, and the teacher's `log_probs`, which get no gradient, are those of `top_k_targets` at the
    same temperature. `mask` [batch...] and `reduction` are as in `reduce`: the result is [batch...]
    or a scalar, at least 0 up to rounding. ValueError for shapes that do not fit.
    """
    _check_shapes(student_logits, indices, log_probs, "log_probs")
    scaled = hide(student_logits, mask).astype(jnp.float32) / temperature
    log_p = jax.lax.stop_gradient(log_probs.astype(jnp.float32))
    log_mass = jax.nn.logsumexp(log_p, axis=-1)
    log_q = jnp.take_along_axis(jax.nn.log_softmax(scaled), indices, axis=-1)
    if not tail:
        log_p = log_p - log_mass[..., None]
    p = jnp.exp(log_p)
    values = jnp.sum(times_log(p, log_p) - times_log(p, log_q), axis=-1)
    # With all classes in S there is no tail, and the logsumexp of nothing has no gradient.
    if tail and indices.shape[-1] < student_logits.shape[-1]:
        values += _tail_term(scaled, indices, log_mass)
    return reduce(square(temperature) * values, mask, reduction)


def sample_targets(
    logits: ArrayLike,
    samples: int,
    temperature: float,
    *,
    seed: int,
    counters: ArrayLike,
    proposal_temperature: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Classes drawn at random, weighted to estimate p = softmax(logits / T) without bias.

    N classes are drawn with replacement from r ∝ p^t, and each weighs w = p / (N r), so that the
    mean of Σ_j w_j [class_j = c] over the draws is p_c (arXiv:2503.16870). With t = 1 every weight
    is 1 / N. With another t the weights of an example sum to 1 only on average; they are not
    divided by their sum, as self-normalized importance sampling does: that is biased.

    The draws are hashes of (seed, draw, counter), as in `kdq.data.transforms`: they do not depend
    on how the examples are batched.

    Args:
      logits: [n, classes] float of the teacher; the arithmetic is float64, on the host.
      samples: N, at least 1; a class may be drawn more than once.
      temperature: T > 0.
      seed: nonnegative int.
      counters: [n] int, distinct: example ids, or positions in the training stream.
      proposal_temperature: the exponent t ≥ 0; 0 draws uniformly.

    Returns:
      Indices int32 [n, N] and weights float32 [n, N].
    """
    logits, counters = np.asarray(logits, np.float64), np.asarray(counters)
    if samples < 1 or temperature <= 0 or proposal_temperature < 0 or seed < 0:
        raise ValueError(
            "samples must be at least 1, temperature positive, proposal_temperature and seed not "
            f"negative; given {samples}, {temperature}, {proposal_temperature}, {seed}"
        )
    if counters.shape != logits.shape[:1]:
        raise ValueError(f"counters {counters.shape} must be one for each of {logits.shape[:1]}")
    log_p = log_softmax(logits / temperature, axis=-1)
    # A class that can't occur is never drawn: at t = 0 it would be, and weigh nothing.
    possible = ~np.isneginf(log_p)
    log_p = np.where(possible, log_p, 0)
    log_r = log_softmax(np.where(possible, proposal_temperature * log_p, -np.inf), axis=-1)
    uniforms = [random_uniform((seed, _SAMPLING, draw), counters) for draw in range(samples)]
    cumulative = np.cumsum(np.exp(log_r), axis=-1)
    cumulative /= cumulative[:, -1:]  # ends at exactly 1, which no uniform number reaches
    indices = np.empty((len(logits), samples), np.int32)
    for row, (bounds, draws) in enumerate(zip(cumulative, np.transpose(uniforms), strict=True)):
        indices[row] = np.searchsorted(bounds, draws, side="right")
    log_p, log_r = (np.take_along_axis(v, indices, axis=-1) for v in (log_p, log_r))
    log_weights = log_p - log_r - np.log(samples)
    return indices, np.exp(log_weights).astype(np.float32)


def sampled_kl(
    student_logits: Array,
    indices: Array,
    weights: Array,
    temperature: Temperature,
    *,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """T² times the cross-entropy to sampled targets: the gradient of the dense KL, on average.

    With q = softmax(student_logits / T) this is -T² Σ_j w_j log q_{class_j}. Its mean over the
    draws is T² KL(p ‖ q) + T² H(p), and its gradient's mean T (q - p), that of `losses.kl`: the two
    differ in value by the teacher's entropy, which the student cannot change. (arXiv:2503.16870.)

    `indices` are [batch..., samples] int, where a class that occurs twice counts twice, and
    `weights`, which get no gradient, of `sample_targets` at the same temperature; the rest is as in
    `top_k_kl`.
    """
    _check_shapes(student_logits, indices, weights, "weights")
    scaled = hide(student_logits, mask).astype(jnp.float32) / temperature
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    log_q = jnp.take_along_axis(jax.nn.log_softmax(scaled), indices, axis=-1)
    values = -jnp.sum(times_log(weights, log_q), axis=-1)
    return reduce(square(temperature) * values, mask, reduction)


def _tail_term(scaled: Array, indices: Array, log_mass: Array) -> Array:
    """p_tail (log p_tail - log q_tail), 0 where the teacher has no tail left in float32."""
    others = jnp.put_along_axis(scaled, indices, -jnp.inf, axis=-1, inplace=False)
    possible = ~jnp.isneginf(others).all(-1)
    # The logsumexp of nothing has no gradient.
    log_others = jax.nn.logsumexp(jnp.where(possible[..., None], others, 0), axis=-1)
    log_q = jnp.where(possible, log_others - jax.nn.logsumexp(scaled, axis=-1), -jnp.inf)
    # log(1 - exp(x)), without cancellation at either end; rounding can leave a mass above 1.
    x = jnp.minimum(log_mass, 0.0)
    log_p = jnp.where(x > -jnp.log(2.0), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))
    p = jnp.exp(log_p)
    # Or one below: where the student rules out the whole tail, so much is none.
    rounding = indices.shape[-1] * jnp.finfo(jnp.float32).eps
    p = jnp.where(~possible & (p < rounding), 0, p)
    return times_log(p, log_p) - times_log(p, log_q)


def _check_shapes(student_logits: Array, indices: Array, values: Array, name: str) -> None:
    check_classes(student_logits)
    if indices.shape != values.shape or indices.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"indices {indices.shape} and {name} {values.shape} must have one shape, that of "
            f"student_logits {student_logits.shape} but for the last axis"
        )
