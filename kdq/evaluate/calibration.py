"""Calibration of a classifier: does it know how often it is right? On the host, in float64."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import softmax

from kdq.evaluate import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reliability:
    """Mean confidence and accuracy of the examples of each bin of confidence, lowest bin first."""

    confidence: np.ndarray  # [bins] float64: mean probability of the prediction; nan if empty
    accuracy: np.ndarray  # [bins] float64: fraction of correct predictions; nan if empty
    count: np.ndarray  # [bins] int64: examples


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
    labels = metrics.class_labels(logits, labels)
    error = softmax(np.asarray(logits, np.float64), axis=-1)
    error[np.arange(len(labels)), labels] -= 1
    return np.sum(error**2, axis=-1)


def reliability(
    logits: ArrayLike, labels: ArrayLike, bins: int = 15, adaptive: bool = False
) -> Reliability:
    """Accuracy by confidence, the probability of the predicted class (arXiv:1706.04599).

    Args:
      logits: [batch, classes] float.
      labels: [batch] int in [0, classes).
      bins: their number M.
      adaptive: False: bins of equal width, bin m holds the confidences in ((m − 1)/M, m/M].
        True: bins of equal mass, as arXiv:1904.01685 has them, of the confidence only: of n
        examples, the one with r smaller confidences is in bin ⌊rM/n⌋. Equal confidences share a
        bin, so that the order of the examples cannot matter; many of them leave bins empty.

    Returns:
      One entry a bin. An example with a NaN logit is in no bin: it has no confidence.

    Raises:
      ValueError: other shapes, a label that is no class, no example, or fewer than one bin.
    """
    labels = metrics.class_labels(logits, labels)
    _check(len(labels), bins)
    confidence = softmax(np.asarray(logits, np.float64), axis=-1).max(-1)
    valid = ~np.isnan(confidence)
    confidence, correct = confidence[valid], metrics.correct(logits, labels)[valid]
    if adaptive:
        # Takes most of a second to import, which --help should not wait for.
        from scipy.stats import rankdata  # noqa: PLC0415

        smaller = rankdata(confidence, method="min").astype(np.int64) - 1
        index = smaller * bins // max(len(confidence), 1)
    else:
        index = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    count = np.bincount(index, minlength=bins)
    share = np.where(count > 0, count, np.nan)
    return Reliability(
        confidence=np.bincount(index, confidence, bins) / share,
        accuracy=np.bincount(index, correct, bins) / share,
        count=count,
    )


def ece(logits: ArrayLike, labels: ArrayLike, bins: int = 15, adaptive: bool = False) -> float:
    """Expected calibration error Σ_m n_m/n |accuracy_m − confidence_m| (arXiv:1706.04599).

    The expectation is over the bins of `reliability`, whose arguments and errors these are.

    Returns:
      In [0, 1]; nan if any logit is NaN.
    """
    result = reliability(logits, labels, bins, adaptive)
    if result.count.sum() < len(np.asarray(logits)):
        return float("nan")
    used = result.count > 0
    gap = np.abs(result.accuracy - result.confidence)[used]
    return float(np.average(gap, weights=result.count[used]))


def top_k_correct(logits: ArrayLike, labels: ArrayLike, k: int) -> np.ndarray:
    """Whether the label's logit is among the k largest; never where a logit is NaN.

    Of equal logits that of the lower class counts as larger, so k = 1 is `metrics.correct`.

    Args:
      logits: [batch, classes] float.
      labels: [batch] int in [0, classes).
      k: in [1, classes]; k = classes is True wherever no logit is NaN.

    Returns:
      [batch] bool.

    Raises:
      ValueError: other shapes, a label that is no class, or k out of range.
    """
    logits, labels = np.asarray(logits), metrics.class_labels(logits, labels)
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"top_k_correct: k must be in [1, {classes}], given {k}")
    own = np.take_along_axis(logits, labels[:, None], axis=-1)
    tied_before = (logits == own) & (np.arange(classes) < labels[:, None])
    rank = np.sum((logits > own) | tied_before, axis=-1)
    return ~np.isnan(logits).any(-1) & (rank < k)


def _check(examples: int, bins: int) -> None:
    if examples == 0:
        raise ValueError("reliability: there are no examples")
    if bins < 1:
        raise ValueError(f"reliability: bins must be at least 1, given {bins}")
