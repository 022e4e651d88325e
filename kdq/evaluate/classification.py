"""Probes of a classifier: calibration, what it took over from its teacher, a bias put right.

They take scores of predictions (`kdq.tasks.classification`) on the host; only `class_offset` needs
the logits of a sample.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from kdq.evaluate import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reliability:
    """Mean confidence and accuracy of the examples of each bin of confidence, lowest bin first."""

    confidence: np.ndarray  # [bins] float64: mean probability of the prediction; nan if empty
    accuracy: np.ndarray  # [bins] float64: fraction of correct predictions; nan if empty
    count: np.ndarray  # [bins] int64: examples


def summarize(scores: Mapping[str, ArrayLike]) -> dict[str, float]:
    """Returns all scalar measures of a student's scores, and of how they follow a teacher's.

    Of scores [predictions] each, of `kdq.tasks.classification`: "accuracy", "top5_accuracy" (of
    more than 5 classes only), "brier", "ece" and "adaptive_ece" (15 bins) as fractions, "nll" in
    nats; with a teacher's scores also "agreement" and "agreement_where_teacher_wrong" as fractions
    (the latter nan if it never is), and "kl_to_teacher", KL(teacher ‖ student) in nats. Except for
    the accuracies and agreements, a NaN among the student's logits makes a measure nan. ValueError
    for no example.
    """
    confidence, correct = scores["confidence"], scores["correct"]
    if not len(correct):
        raise ValueError("summarize: there are no examples")
    values = {"accuracy": np.mean(correct)}
    if "top5" in scores:
        values["top5_accuracy"] = np.mean(scores["top5"])
    values |= {
        "nll": np.mean(scores["nll"]),
        "brier": np.mean(scores["brier"]),
        "ece": ece(confidence, correct),
        "adaptive_ece": ece(confidence, correct, adaptive=True),
    }
    if "kl" in scores:
        values |= {
            "agreement": np.mean(scores["agreement"]),
            "kl_to_teacher": np.mean(scores["kl"]),
            "agreement_where_teacher_wrong": agreement_where_teacher_wrong(
                scores["agreement"], scores["teacher_correct"]
            ),
        }
    return {name: float(value) for name, value in values.items()}


def reliability(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, adaptive: bool = False
) -> Reliability:
    """Computes accuracy by confidence, the probability of the predicted class (arXiv:1706.04599).

    Of confidence [predictions] float, where one that is NaN is in no bin, and correct [predictions]
    bool. Bins of equal width: bin m of M holds the confidences in ((m − 1)/M, m/M]. If `adaptive`,
    of equal mass, as arXiv:1904.01685 has them, of the confidence only: of n examples, the one with
    r smaller confidences is in bin ⌊rM/n⌋. Equal confidences share a bin, so that the order of the
    examples cannot matter; many of them leave bins empty. ValueError for different shapes, no
    example, or fewer than one bin.
    """
    confidence, correct = np.asarray(confidence), np.asarray(correct)
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise ValueError(
            "confidence and correct must have one shape [predictions], got "
            f"{confidence.shape} and {correct.shape}"
        )
    if not len(confidence):
        raise ValueError("reliability: there are no examples")
    if bins < 1:
        raise ValueError(f"reliability: bins must be at least 1, given {bins}")
    valid = ~np.isnan(confidence)
    confidence, correct = confidence[valid], correct[valid]
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


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = 15, adaptive: bool = False) -> float:
    """Computes the expected calibration error Σ_m n_m/n |accuracy_m − confidence_m|.

    (arXiv:1706.04599.) The expectation is over the bins of `reliability`, whose arguments and
    errors these are. In [0, 1]; nan if any confidence is NaN.
    """
    result = reliability(confidence, correct, bins, adaptive)
    if result.count.sum() < len(np.asarray(confidence)):
        return float("nan")
    used = result.count > 0
    gap = np.abs(result.accuracy - result.confidence)[used]
    return float(np.average(gap, weights=result.count[used]))


def agreement_where_teacher_wrong(agreement: ArrayLike, teacher_correct: ArrayLike) -> float:
    """Returns the fraction of the teacher's errors that the student makes too, alike.

    Agreement where the teacher is right also grows as the student learns the task. This part of
    the agreement (fidelity, arXiv:2106.05945) can only come from the teacher or from mistakes that
    the data suggest; a student trained without a teacher shows how many of the latter there are.

    Of agreement [predictions], whether both predict one class, and teacher_correct [predictions]:
    in [0, 1]; nan if the teacher is never wrong.
    """
    wrong = np.asarray(teacher_correct) == 0
    return float(np.asarray(agreement)[wrong].mean()) if wrong.any() else float("nan")


def accuracy_by_class(labels: ArrayLike, correct: ArrayLike, classes: int) -> np.ndarray:
    """Returns the accuracy on the examples of each class, its recall: [classes] float64.

    Of labels [predictions] int and correct [predictions] bool; nan for a class without an example.
    """
    labels = np.asarray(labels, np.int64)
    count = np.bincount(labels, minlength=classes)
    return np.bincount(labels, correct, classes) / np.where(count > 0, count, np.nan)


def class_offset(logits: ArrayLike, labels: ArrayLike, classes: Sequence[int]) -> float:
    """Returns the number that, added to the logits of `classes`, makes the most predictions right.

    A student that is distilled without any example of a class has learned a bias that is much too
    low for it, but may know its shape (Hinton et al., 2015, arXiv:1503.02531, §3, who choose the
    offset on test; choose it on validation). Of equally good offsets, the middle of the widest
    interval; 0 if nothing is better. `classes` are some, not all; ValueError for others.
    """
    logits = np.asarray(logits, np.float64)
    labels = metrics.class_labels(logits, labels)
    raised = np.zeros(logits.shape[1], bool)
    if not set(classes) <= set(range(len(raised))) or not 0 < len(set(classes)) < len(raised):
        raise ValueError(
            f"classes={tuple(classes)}: expected some of 0 to {len(raised) - 1}, not all"
        )
    raised[list(classes)] = True
    inner = np.where(raised, logits, -np.inf)
    outer = np.where(raised, -np.inf, logits)
    threshold = outer.max(1) - inner.max(1)  # beyond it one of `classes` is predicted
    gained = (inner.argmax(1) == labels).astype(int) - (outer.argmax(1) == labels)
    # After the k smallest thresholds are passed, right[k] more are right than with none passed.
    order = np.argsort(threshold)
    edges, right = threshold[order], np.concatenate([[0], np.cumsum(gained[order])])
    ends = np.concatenate([[edges[0] - 1], edges, [edges[-1] + 1]])
    widths = np.diff(ends)
    now = right[np.searchsorted(edges, 0.0, side="left")]
    best = right[widths > 0].max()
    if best <= now:
        return 0.0
    k = int(np.argmax(np.where(right == best, widths, -1.0)))
    return float((ends[k] + ends[k + 1]) / 2)
