"""Calibration against scikit-learn and a loop over bins written from the definition."""

import math

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, top_k_accuracy_score

from kdq.evaluate import metrics
from kdq.evaluate.calibration import brier, ece, reliability, top_k_correct


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


def test_brier_is_the_sum_of_scikit_learns_scores_of_each_class_against_the_rest():
    logits, labels = _problem()
    p = softmax(logits, axis=-1)
    binary = [brier_score_loss(labels == c, p[:, c]) for c in range(7)]
    scores = brier(logits, labels)
    assert scores.dtype == np.float64
    assert scores.mean() == pytest.approx(sum(binary))
    one = brier_score_loss(np.arange(7) == labels[3], p[3])  # the mean over classes
    assert scores[3] == pytest.approx(7 * one)


def test_brier_at_its_ends():
    certain = [[1e4, -1e4, 0.0]]
    np.testing.assert_allclose(brier(certain, [0]), [0.0], atol=1e-12)
    np.testing.assert_allclose(brier(certain, [1]), [2.0])
    np.testing.assert_allclose(brier(np.zeros((1, 4)), [2]), [3 * 0.25**2 + 0.75**2])


@pytest.mark.parametrize(("adaptive", "strategy"), [(False, "uniform"), (True, "quantile")])
@pytest.mark.parametrize("bins", [5, 15])
def test_reliability_is_scikit_learns_calibration_curve_of_the_prediction(adaptive, strategy, bins):
    logits, labels = _problem()
    confidence = softmax(logits, axis=-1).max(-1)
    correct = logits.argmax(-1) == labels
    accuracy, mean = calibration_curve(correct, confidence, n_bins=bins, strategy=strategy)
    result = reliability(logits, labels, bins, adaptive)
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
    assert ece(logits, labels, bins) == pytest.approx(expected)


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    # 3/4 is exact in binary, and so is its softmax.
    logits = np.log([[3.0, 1.0], [3.0, 1.0]])
    assert softmax(logits[0])[0] == 0.75
    assert reliability(logits, [0, 1], bins=4).count.tolist() == [0, 0, 2, 0]


def test_ece_by_hand():
    # Ten at 0.9 of which 6 are right, ten at 0.6 of which 6 are right: (0.3 + 0) / 2.
    logits = _binary([0.9] * 10 + [0.6] * 10)
    labels = ([0] * 6 + [1] * 4) * 2
    assert ece(logits, labels, bins=5) == pytest.approx(0.15)
    assert ece(logits, labels, bins=2, adaptive=True) == pytest.approx(0.15)
    assert ece(logits, labels, bins=1) == pytest.approx(0.75 - 0.6)  # opposite signs cancel


def test_ece_of_a_calibrated_and_of_a_certain_but_wrong_model():
    assert ece(_binary([0.75] * 4), [0, 0, 0, 1]) == pytest.approx(0, abs=1e-12)
    assert ece(_binary([1.0] * 4), [1, 1, 1, 1]) == pytest.approx(1)


def test_equal_confidences_share_an_adaptive_bin_whatever_their_order():
    rng = np.random.default_rng(1)
    logits = _binary([0.9] * 10 + [0.6] * 10)
    labels = np.array([0] * 5 + [1] * 5 + [0] * 10)
    expected = 0.5 * abs(0.5 - 0.9) + 0.5 * abs(1 - 0.6)
    for _ in range(3):
        order = rng.permutation(20)
        result = reliability(logits[order], labels[order], bins=4, adaptive=True)
        assert result.count.tolist() == [10, 0, 10, 0]
        value = ece(logits[order], labels[order], bins=4, adaptive=True)
        assert value == pytest.approx(expected)


def test_a_diverged_example_is_in_no_bin_and_makes_the_error_nan():
    logits = np.concatenate([_binary([0.9, 0.9]), [[np.nan, 0.0]]])
    for adaptive in (False, True):
        result = reliability(logits, [0, 1, 0], 3, adaptive)
        assert result.count.sum() == 2
        assert np.nansum(result.accuracy) == 0.5
        assert math.isnan(ece(logits, [0, 1, 0], adaptive=adaptive))
        assert math.isnan(ece(np.full((2, 3), np.nan), [0, 1], adaptive=adaptive))
    assert np.isnan(brier(logits, [0, 1, 0])).tolist() == [False, False, True]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_scikit_learns_for_each_example(k):
    logits, labels = _problem(n=40)
    expected = [
        top_k_accuracy_score(labels[i : i + 1], logits[i : i + 1], k=k, labels=np.arange(7))
        for i in range(40)
    ]
    assert top_k_correct(logits, labels, k).tolist() == expected
    assert 0 < np.mean(expected) < 1
    assert top_k_correct(logits, labels, 7).all()


def test_top_1_is_correct_also_of_ties_and_nans():
    logits = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, np.nan, 1.0], [2.0, 0.0, 5.0]])
    labels = [0, 1, 1, 2]
    np.testing.assert_array_equal(top_k_correct(logits, labels, 1), metrics.correct(logits, labels))
    assert top_k_correct(logits, labels, 1).tolist() == [True, False, False, True]
    assert top_k_correct(logits, labels, 2).tolist() == [True, True, False, True]
    assert top_k_correct(logits, labels, 3).tolist() == [True, True, False, True]


@pytest.mark.parametrize("k", [0, 4])
def test_k_that_is_no_number_of_classes_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must be in \[1, 3\], given {k}"):
        top_k_correct(np.zeros((2, 3)), [0, 1], k)


@pytest.mark.parametrize("measure", [brier, ece, reliability, lambda x, y: top_k_correct(x, y, 1)])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3)), [0], r"given \(2, 3\) and \(1,\)"),
        (np.zeros(3), [0], r"given \(3,\) and \(1,\)"),
        (np.zeros((2, 3)), [0, 3], r"in \[0, 3\), given 0 to 3"),
        (np.zeros((2, 3)), [0.0, 1.0], "must be integers, given float64"),
    ],
)
def test_labels_that_do_not_fit_the_logits_are_refused(measure, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        measure(logits, labels)


def test_no_example_and_no_bin_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        ece(np.zeros((0, 3)), [])
    with pytest.raises(ValueError, match="bins must be at least 1, given 0"):
        ece(np.zeros((1, 3)), [0], bins=0)
