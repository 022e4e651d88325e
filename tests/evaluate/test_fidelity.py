"""Fidelity where the teacher errs, accuracy by class, and the table of all measures."""

import math

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score

from kdq.evaluate import fidelity


def _logits(predictions, classes=3):
    return 4.0 * np.eye(classes)[predictions]


def _problem(n=200, classes=7):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    student, teacher = rng.normal(size=(2, n, classes))
    teacher[np.arange(n), labels] += 1.5
    return 0.5 * student + teacher, teacher, labels


def test_agreement_where_the_teacher_is_wrong_by_hand():
    labels = [0, 0, 0, 1, 2]
    teacher = _logits([0, 1, 1, 2, 1])  # wrong on all but the first
    student = _logits([0, 1, 2, 2, 2])  # follows it twice in four, is right once, errs anew once
    assert fidelity.agreement_where_teacher_wrong(student, teacher, labels) == 0.5
    # Agreement on the example that the teacher has right counts for nothing.
    student = _logits([1, 1, 2, 2, 2])
    assert fidelity.agreement_where_teacher_wrong(student, teacher, labels) == 0.5


def test_a_teacher_that_is_never_wrong_has_no_errors_to_share():
    labels = [0, 1]
    value = fidelity.agreement_where_teacher_wrong(_logits([1, 0]), _logits(labels), labels)
    assert math.isnan(value)


def test_accuracy_by_class_is_scikit_learns_recall():
    student, _, labels = _problem()
    expected = recall_score(labels, student.argmax(-1), average=None, labels=np.arange(7))
    np.testing.assert_allclose(fidelity.accuracy_by_class(student, labels), expected)
    assert np.ptp(expected) > 0.05


def test_a_class_without_examples_has_no_accuracy():
    by_class = fidelity.accuracy_by_class(_logits([0, 2, 0]), [0, 0, 0])
    np.testing.assert_allclose(by_class, [2 / 3, np.nan, np.nan])
    assert np.isnan(fidelity.accuracy_by_class(np.zeros((0, 3)), [])).all()


def _expected(student, teacher, labels):
    q, p = softmax(student, axis=-1), softmax(teacher, axis=-1)
    prediction, taught = q.argmax(-1), p.argmax(-1)
    wrong = [i for i in range(len(labels)) if taught[i] != labels[i]]
    one_hot = np.eye(7)[labels]
    # Confidences sorted, 200 examples in 15 bins: example r is in bin r * 15 // 200.
    order, confidence = np.argsort(q.max(-1)), q.max(-1)
    groups = [order[[r for r in range(200) if r * 15 // 200 == m]] for m in range(15)]
    ece = [[i for i in range(200) if m / 15 < confidence[i] <= (m + 1) / 15] for m in range(15)]

    def gap(group):
        right = np.mean(prediction[group] == labels[group])
        return len(group) / 200 * abs(right - confidence[group].mean())

    return {
        "accuracy": accuracy_score(labels, prediction),
        "top5_accuracy": top_k_accuracy_score(labels, student, k=5, labels=np.arange(7)),
        "nll": log_loss(labels, q, labels=np.arange(7)),
        "brier": np.mean(np.sum((q - one_hot) ** 2, axis=-1)),
        "ece": sum(gap(g) for g in ece if g),
        "adaptive_ece": sum(gap(g) for g in groups),
        "agreement": accuracy_score(taught, prediction),
        "kl_to_teacher": entropy(p, q, axis=-1).mean(),
        "agreement_where_teacher_wrong": np.mean([prediction[i] == taught[i] for i in wrong]),
    }


def test_summary_against_scikit_learn_and_scipy():
    student, teacher, labels = _problem()
    result = fidelity.transfer_summary(student, labels, teacher)
    assert result == pytest.approx(_expected(student, teacher, labels), rel=1e-9)
    assert all(type(value) is float for value in result.values())
    assert 0 < result["agreement_where_teacher_wrong"] < result["agreement"] < 1


def test_summary_without_a_teacher_and_of_few_classes_has_no_such_entries():
    student, teacher, labels = _problem(classes=5)
    alone = {"accuracy", "nll", "brier", "ece", "adaptive_ece"}
    assert set(fidelity.transfer_summary(student, labels)) == alone
    taught = alone | {"agreement", "kl_to_teacher", "agreement_where_teacher_wrong"}
    assert set(fidelity.transfer_summary(student, labels, teacher)) == taught


def test_summary_of_a_diverged_student():
    _, teacher, labels = _problem()
    result = fidelity.transfer_summary(np.full_like(teacher, np.nan), labels, teacher)
    zero = {"accuracy", "top5_accuracy", "agreement", "agreement_where_teacher_wrong"}
    assert {name for name, value in result.items() if value == 0} == zero
    assert {name for name, value in result.items() if math.isnan(value)} == set(result) - zero


def test_what_does_not_belong_together_is_refused():
    student, teacher, labels = _problem()
    pair = r"one shape \[batch, classes\], given"
    with pytest.raises(ValueError, match=pair):
        fidelity.transfer_summary(student, labels, teacher[:, :6])
    with pytest.raises(ValueError, match=pair):
        fidelity.agreement_where_teacher_wrong(student[:1], teacher, labels)
    with pytest.raises(ValueError, match=r"given \(200, 7\) and \(1,\)"):
        fidelity.transfer_summary(student, labels[:1], teacher)
    with pytest.raises(ValueError, match=r"given \(200, 7\) and \(1,\)"):
        fidelity.accuracy_by_class(student, labels[:1])
    with pytest.raises(ValueError, match="no examples"):
        fidelity.transfer_summary(student[:0], labels[:0])
    teacher[3, 2] = np.nan
    with pytest.raises(ValueError, match="predicts nothing"):
        fidelity.agreement_where_teacher_wrong(student, teacher, labels)
    with pytest.raises(ValueError, match="predicts nothing"):
        fidelity.transfer_summary(student, labels, teacher)
