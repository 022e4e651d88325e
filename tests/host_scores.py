"""Scores of a classifier's logits in float64 NumPy: what those of `kdq.tasks` are compared with."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, softmax

from kdq.evaluate.metrics import class_labels, correct


def nll(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Negative log-likelihood of the label in nats.

    Args:
      logits: [batch, classes] float.
      labels: [batch] int in [0, classes).

    Returns:
      [batch] float64.

    Raises:
      ValueError: a label that is no class.
    """
    log_p, labels = _log_softmax(logits), class_labels(logits, labels)
    return -np.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]


def agreement(student_logits: ArrayLike, teacher_logits: ArrayLike) -> np.ndarray:
    """Returns whether student and teacher predict one class (fidelity, arXiv:2106.05945).

    Args:
      student_logits: [batch, classes] float.
      teacher_logits: [batch, classes] float.

    Returns:
      [batch] bool.
    """
    return correct(student_logits, np.asarray(teacher_logits).argmax(-1))


def kl_divergence(p_logits: ArrayLike, q_logits: ArrayLike) -> np.ndarray:
    """KL(p ‖ q) = Σ p (log p − log q) of the two softmax distributions, in nats.

    Computed in log space, so finite for every pair of finite logits. A logit of −inf is a class of
    probability 0, and 0 log 0 = 0: +inf where p has mass and q has none.

    Args:
      p_logits: [batch, classes] float, of the reference distribution (the teacher).
      q_logits: [batch, classes] float, of the approximating one (the student).

    Returns:
      [batch] float64, at least 0.
    """
    log_p, log_q = _log_softmax(p_logits), _log_softmax(q_logits)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # of 0 · (−inf), and of −inf less −inf
        terms = np.where(p == 0, 0.0, p * (log_p - log_q))
    # Rounding can leave -1e-17 where the two are equal.
    return np.maximum(terms.sum(-1), 0.0)


def confidence(logits: ArrayLike) -> np.ndarray:
    """Returns the probability of the predicted class: [batch] float64, nan where a logit is NaN."""
    return softmax(np.asarray(logits, np.float64), axis=-1).max(-1)


def brier(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Brier's score Σ_c (p_c − y_c)² of the softmax probabilities p and the one-hot label y.

    The sum over all classes, so twice the usual binary score. (Brier, 1950, Verification of
    forecasts expressed in terms of probability.)

    Args:
      logits: [batch, classes] float.
      labels: [batch] int in [0, classes).

    Returns:
      [batch] float64 in [0, 2]; nan where a logit is NaN.

    Raises:
      ValueError: other shapes, or a label that is no class.
    """
    labels = class_labels(logits, labels)
    error = softmax(np.asarray(logits, np.float64), axis=-1)
    error[np.arange(len(labels)), labels] -= 1
    return np.sum(error**2, axis=-1)


def top_k_correct(logits: ArrayLike, labels: ArrayLike, k: int) -> np.ndarray:
    """Returns whether the label's logit is among the k largest; never where a logit is NaN.

    Of equal logits that of the lower class counts as larger, so k = 1 is `correct`.

    Args:
      logits: [batch, classes] float.
      labels: [batch] int in [0, classes).
      k: in [1, classes]; k = classes is True wherever no logit is NaN.

    Returns:
      [batch] bool.

    Raises:
      ValueError: other shapes, a label that is no class, or k out of range.
    """
    logits, labels = np.asarray(logits), class_labels(logits, labels)
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"top_k_correct: k must be in [1, {classes}], given {k}")
    of_label = np.take_along_axis(logits, labels[:, None], axis=-1)
    tied_before = (logits == of_label) & (np.arange(classes) < labels[:, None])
    rank = np.sum((logits > of_label) | tied_before, axis=-1)
    return ~np.isnan(logits).any(-1) & (rank < k)


def score(
    logits: ArrayLike, labels: ArrayLike, teacher_logits: ArrayLike | None = None
) -> dict[str, np.ndarray]:
    """Returns the scores of a classification, as `kdq.tasks.classification` has them, [batch] each.

    Args:
      logits: [batch, classes] float.
      labels: [batch] int in [0, classes).
      teacher_logits: [batch, classes] float.

    Returns:
      "nll", "correct", "confidence", "brier", and of more than 5 classes "top5"; with a teacher
      "kl" and "agreement", and "teacher_correct".

    Raises:
      ValueError: other shapes, a label that is no class, or a teacher's logit that is NaN.
    """
    scores = {
        "nll": nll(logits, labels),
        "correct": correct(logits, labels),
        "confidence": confidence(logits),
        "brier": brier(logits, labels),
    }
    if np.shape(logits)[1] > 5:
        scores["top5"] = top_k_correct(logits, labels, 5)
    if teacher_logits is None:
        return scores
    student, teacher = np.shape(logits), np.shape(teacher_logits)
    if student != teacher:
        raise ValueError(
            f"logits must have one shape [batch, classes], given {student}, teacher's {teacher}"
        )
    # argmax takes a NaN for the maximum: the student could seem to follow what is no prediction.
    if np.isnan(np.asarray(teacher_logits)).any():
        raise ValueError("teacher_logits hold a NaN: such a teacher predicts nothing")
    return scores | {
        "kl": kl_divergence(teacher_logits, logits),
        "agreement": agreement(logits, teacher_logits),
        "teacher_correct": correct(teacher_logits, labels),
    }


def _log_softmax(logits: ArrayLike) -> np.ndarray:
    return log_softmax(np.asarray(logits, np.float64), axis=-1)
