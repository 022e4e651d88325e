"""Probes of a classifier against scikit-learn, scipy, loops by definition, and searches."""

import math

import host_scores
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score

from kdq.evaluate import metrics
from kdq.evaluate.classification import (
    accuracy_by_class,
    agreement_where_teacher_wrong,
    class_offset,
    ece,
    reliability,
    summarize,
)


def _scored(logits, labels):
    return host_scores.confidence(logits), metrics.correct(logits, labels)


def _problem(n=300, classes=7, spread=2.0):
    rng = np.random.default_rng(0)
    return spread * rng.normal(size=(n, classes)), rng.integers(0, classes, n)


def _binary(confidence):
    """Logits of two classes whose larger probability, of class 0, is the confidence."""
    confidence = np.asarray(confidence, np.float64)
    with np.errstate(divide="ignore"):
        return np.log(np.stack([confidence, 1 - confidence], axis=1))


def _loop_ece(confidence, correct, bins):
    """Guo et al.'s sum over the bins ((m - 1)/M, m/M], with exact edges."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins]
        if inside:
            accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
            mean = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


@pytest.mark.parametrize(("adaptive", "strategy"), [(False, "uniform"), (True, "quantile")])
@pytest.mark.parametrize("bins", [5, 15])
def test_reliability_is_scikit_learns_calibration_curve_of_the_prediction(adaptive, strategy, bins):
    logits, labels = _problem()
    confidence = softmax(logits, axis=-1).max(-1)
    correct = logits.argmax(-1) == labels
    accuracy, mean = calibration_curve(correct, confidence, n_bins=bins, strategy=strategy)
    result = reliability(*_scored(logits, labels), bins, adaptive)
    used = result.count > 0
    np.testing.assert_allclose(result.accuracy[used], accuracy)
    np.testing.assert_allclose(result.confidence[used], mean)
    assert np.isnan(result.accuracy[~used]).all()
    assert np.isnan(result.confidence[~used]).all()
    assert (len(result.count), result.count.sum()) == (bins, 300)
    if adaptive:
        assert (result.count == 300 // bins).all()
    else:
        assert not used.all()  # 7 classes: no confidence is below 1/7


@pytest.mark.parametrize("bins", [1, 4, 10, 15])
def test_ece_is_the_sum_over_bins_written_as_a_loop(bins):
    logits, labels = _problem()
    confidence = softmax(logits, axis=-1).max(-1)
    expected = _loop_ece(confidence, logits.argmax(-1) == labels, bins)
    assert expected > 0.1
    assert ece(*_scored(logits, labels), bins) == pytest.approx(expected)


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    # 3/4 is exact in binary, and so is its softmax.
    logits = np.log([[3.0, 1.0], [3.0, 1.0]])
    assert softmax(logits[0])[0] == 0.75
    assert reliability(*_scored(logits, [0, 1]), bins=4).count.tolist() == [0, 0, 2, 0]


def test_ece_by_hand():
    # Ten at 0.9 of which 6 are right, ten at 0.6 of which 6 are right: (0.3 + 0) / 2.
    logits = _binary([0.9] * 10 + [0.6] * 10)
    labels = ([0] * 6 + [1] * 4) * 2
    assert ece(*_scored(logits, labels), bins=5) == pytest.approx(0.15)
    assert ece(*_scored(logits, labels), bins=2, adaptive=True) == pytest.approx(0.15)
    assert ece(*_scored(logits, labels), bins=1) == pytest.approx(
        0.75 - 0.6
    )  # opposite signs cancel


def test_ece_of_a_calibrated_and_of_a_certain_but_wrong_model():
    assert ece(*_scored(_binary([0.75] * 4), [0, 0, 0, 1])) == pytest.approx(0, abs=1e-12)
    assert ece(*_scored(_binary([1.0] * 4), [1, 1, 1, 1])) == pytest.approx(1)


def test_equal_confidences_share_an_adaptive_bin_whatever_their_order():
    rng = np.random.default_rng(1)
    logits = _binary([0.9] * 10 + [0.6] * 10)
    labels = np.array([0] * 5 + [1] * 5 + [0] * 10)
    expected = 0.5 * abs(0.5 - 0.9) + 0.5 * abs(1 - 0.6)
    for _ in range(3):
        order = rng.permutation(20)
        result = reliability(*_scored(logits[order], labels[order]), bins=4, adaptive=True)
        assert result.count.tolist() == [10, 0, 10, 0]
        value = ece(*_scored(logits[order], labels[order]), bins=4, adaptive=True)
        assert value == pytest.approx(expected)


def test_a_diverged_example_is_in_no_bin_and_makes_the_error_nan():
    logits = np.concatenate([_binary([0.9, 0.9]), [[np.nan, 0.0]]])
    for adaptive in (False, True):
        result = reliability(*_scored(logits, [0, 1, 0]), 3, adaptive)
        assert result.count.sum() == 2
        assert np.nansum(result.accuracy) == 0.5
        assert math.isnan(ece(*_scored(logits, [0, 1, 0]), adaptive=adaptive))
        assert math.isnan(ece(*_scored(np.full((2, 3), np.nan), [0, 1]), adaptive=adaptive))
    assert np.isnan(host_scores.brier(logits, [0, 1, 0])).tolist() == [False, False, True]


def test_no_example_and_no_bin_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        ece([], [])
    with pytest.raises(ValueError, match="bins must be at least 1, given 0"):
        ece([0.5], [True], bins=0)
    for measure in (ece, reliability):
        with pytest.raises(ValueError, match=r"one shape \[predictions\], got \(2,\) and \(1,\)"):
            measure([0.5, 0.6], [True])


def _logits(predictions, classes=3):
    return 4.0 * np.eye(classes)[predictions]


def _agreement_where_wrong(student, teacher, labels):
    scores = host_scores.score(student, labels, teacher)
    return agreement_where_teacher_wrong(scores["agreement"], scores["teacher_correct"])


def _by_class(logits, labels):
    return accuracy_by_class(labels, metrics.correct(logits, labels), np.shape(logits)[1])


def _taught(n=200, classes=7):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    student, teacher = rng.normal(size=(2, n, classes))
    teacher[np.arange(n), labels] += 1.5
    return 0.5 * student + teacher, teacher, labels


def test_agreement_where_the_teacher_is_wrong_by_hand():
    labels = [0, 0, 0, 1, 2]
    teacher = _logits([0, 1, 1, 2, 1])  # wrong on all but the first
    student = _logits([0, 1, 2, 2, 2])  # follows it twice in four, is right once, errs anew once
    assert _agreement_where_wrong(student, teacher, labels) == 0.5
    # Agreement on the example that the teacher has right counts for nothing.
    student = _logits([1, 1, 2, 2, 2])
    assert _agreement_where_wrong(student, teacher, labels) == 0.5


def test_a_teacher_that_is_never_wrong_has_no_errors_to_share():
    labels = [0, 1]
    value = _agreement_where_wrong(_logits([1, 0]), _logits(labels), labels)
    assert math.isnan(value)


def test_accuracy_by_class_is_scikit_learns_recall():
    student, _, labels = _taught()
    expected = recall_score(labels, student.argmax(-1), average=None, labels=np.arange(7))
    np.testing.assert_allclose(_by_class(student, labels), expected)
    assert np.ptp(expected) > 0.05


def test_a_class_without_examples_has_no_accuracy():
    by_class = _by_class(_logits([0, 2, 0]), [0, 0, 0])
    np.testing.assert_allclose(by_class, [2 / 3, np.nan, np.nan])
    assert np.isnan(_by_class(np.zeros((0, 3)), [])).all()


def _expected_summary(student, teacher, labels):
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
    student, teacher, labels = _taught()
    result = summarize(host_scores.score(student, labels, teacher))
    assert result == pytest.approx(_expected_summary(student, teacher, labels), rel=1e-9)
    assert all(type(value) is float for value in result.values())
    assert 0 < result["agreement_where_teacher_wrong"] < result["agreement"] < 1


def test_summary_without_a_teacher_and_of_few_classes_has_no_such_entries():
    student, teacher, labels = _taught(classes=5)
    alone = {"accuracy", "nll", "brier", "ece", "adaptive_ece"}
    assert set(summarize(host_scores.score(student, labels))) == alone
    taught = alone | {"agreement", "kl_to_teacher", "agreement_where_teacher_wrong"}
    assert set(summarize(host_scores.score(student, labels, teacher))) == taught


def test_summary_of_a_diverged_student():
    _, teacher, labels = _taught()
    result = summarize(host_scores.score(np.full_like(teacher, np.nan), labels, teacher))
    zero = {"accuracy", "top5_accuracy", "agreement", "agreement_where_teacher_wrong"}
    assert {name for name, value in result.items() if value == 0} == zero
    assert {name for name, value in result.items() if math.isnan(value)} == set(result) - zero


def test_what_does_not_belong_together_is_refused():
    student, teacher, labels = _taught()
    pair = r"one shape \[batch, classes\], given"
    with pytest.raises(ValueError, match=pair):
        summarize(host_scores.score(student, labels, teacher[:, :6]))
    with pytest.raises(ValueError, match=pair):
        _agreement_where_wrong(student, teacher[:1], labels)
    with pytest.raises(ValueError, match=r"given \(200, 7\) and \(1,\)"):
        summarize(host_scores.score(student, labels[:1], teacher))
    with pytest.raises(ValueError, match=r"given \(200, 7\) and \(1,\)"):
        _by_class(student, labels[:1])
    with pytest.raises(ValueError, match="no examples"):
        summarize(host_scores.score(student[:0], labels[:0]))
    teacher[3, 2] = np.nan
    with pytest.raises(ValueError, match="predicts nothing"):
        _agreement_where_wrong(student, teacher, labels)
    with pytest.raises(ValueError, match="predicts nothing"):
        summarize(host_scores.score(student, labels, teacher))


def _accuracy(logits, labels, classes, offset):
    raised = logits.copy()
    raised[:, list(classes)] += offset
    return (raised.argmax(1) == labels).mean()


@pytest.mark.parametrize("classes", [(2,), (0, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_no_offset_is_better(classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 60)
    logits = rng.normal(size=(60, 5)) + 2 * np.eye(5)[labels]
    logits[:, list(classes)] -= 3.3
    offset = class_offset(logits, labels, classes)
    best = max(_accuracy(logits, labels, classes, b) for b in np.linspace(-10, 10, 4001))
    assert _accuracy(logits, labels, classes, offset) >= best
    assert best > _accuracy(logits, labels, classes, 0.0)
    assert 1 < offset < 6


def test_what_is_right_already_stays():
    labels = np.arange(4)
    assert class_offset(5 * np.eye(4), labels, (1,)) == 0.0


@pytest.mark.parametrize("classes", [(), (0, 1, 2), (3,), (-1,)])
def test_classes_that_make_no_sense_are_refused(classes):
    with pytest.raises(ValueError, match="expected some of 0 to 2, not all"):
        class_offset(np.zeros((2, 3)), [0, 1], classes)
