"""What a student took over from its teacher, errors included. On the host, in float64."""

import numpy as np
from numpy.typing import ArrayLike

from kdq.evaluate import calibration, metrics


def agreement_where_teacher_wrong(
    student_logits: ArrayLike, teacher_logits: ArrayLike, labels: ArrayLike
) -> float:
    """Fraction of the teacher's errors that the student makes too, with the same wrong class.

    Agreement where the teacher is right also grows as the student learns the task. This part of
    the agreement (fidelity, arXiv:2106.05945) can only come from the teacher or from mistakes that
    the data suggest; a student trained without a teacher shows how many of the latter there are.

    Args:
      student_logits: [batch, classes] float; a NaN agrees with nothing.
      teacher_logits: [batch, classes] float.
      labels: [batch] int in [0, classes).

    Returns:
      In [0, 1]; nan if the teacher is never wrong.

    Raises:
      ValueError: other shapes, a label that is no class, or a teacher's logit that is NaN.
    """
    _check_pair(student_logits, teacher_logits)
    wrong = ~metrics.correct(teacher_logits, labels)
    same = metrics.agreement(student_logits, teacher_logits)
    return float(same[wrong].mean()) if wrong.any() else float("nan")


def accuracy_by_class(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Accuracy on the examples of each class: its recall.

    Args:
      logits: [batch, classes] float.
      labels: [batch] int in [0, classes).

    Returns:
      [classes] float64 in [0, 1]; nan for a class of which there is no example.

    Raises:
      ValueError: other shapes, or a label that is no class.
    """
    labels, classes = metrics.class_labels(logits, labels), np.shape(logits)[1]
    if len(labels) == 0:
        return np.full(classes, np.nan)
    count = np.bincount(labels, minlength=classes)
    right = np.bincount(labels, metrics.correct(logits, labels), classes)
    return right / np.where(count > 0, count, np.nan)


def transfer_summary(
    student_logits: ArrayLike, labels: ArrayLike, teacher_logits: ArrayLike | None = None
) -> dict[str, float]:
    """All scalar measures of a student's logits, and of how they follow a teacher's.

    Args:
      student_logits: [batch, classes] float.
      labels: [batch] int in [0, classes).
      teacher_logits: [batch, classes] float.

    Returns:
      "accuracy", "top5_accuracy" (of more than 5 classes only), "brier", "ece" and "adaptive_ece"
      (15 bins) as fractions, "nll" in nats; with a teacher also "agreement" and
      "agreement_where_teacher_wrong" as fractions (the latter nan if it never is), and
      "kl_to_teacher", KL(teacher ‖ student) in nats. Except for the accuracies and agreements,
      a NaN among the student's logits makes a measure nan.

    Raises:
      ValueError: other shapes, no example, a label that is no class, or a teacher's logit that is
        NaN.
    """
    labels = metrics.class_labels(student_logits, labels)
    if len(labels) == 0:
        raise ValueError("transfer_summary: there are no examples")
    values = {"accuracy": metrics.correct(student_logits, labels).mean()}
    if np.shape(student_logits)[1] > 5:
        values["top5_accuracy"] = calibration.top_k_correct(student_logits, labels, 5).mean()
    values |= {
        "nll": metrics.nll(student_logits, labels).mean(),
        "brier": calibration.brier(student_logits, labels).mean(),
        "ece": calibration.ece(student_logits, labels),
        "adaptive_ece": calibration.ece(student_logits, labels, adaptive=True),
    }
    if teacher_logits is not None:
        _check_pair(student_logits, teacher_logits)
        values |= {
            "agreement": metrics.agreement(student_logits, teacher_logits).mean(),
            "kl_to_teacher": metrics.kl_divergence(teacher_logits, student_logits).mean(),
            "agreement_where_teacher_wrong": agreement_where_teacher_wrong(
                student_logits, teacher_logits, labels
            ),
        }
    return {name: float(value) for name, value in values.items()}


def _check_pair(student_logits: ArrayLike, teacher_logits: ArrayLike) -> None:
    student, teacher = np.shape(student_logits), np.shape(teacher_logits)
    if student != teacher or len(student) != 2:
        raise ValueError(
            "student_logits and teacher_logits must have one shape [batch, classes], "
            f"given {student} and {teacher}"
        )
    # argmax takes a NaN for the maximum: the student could seem to follow what is no prediction.
    if np.isnan(np.asarray(teacher_logits)).any():
        raise ValueError("teacher_logits hold a NaN: such a teacher predicts nothing")
