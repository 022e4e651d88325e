"""Classification against float64 NumPy, scikit-learn and closed forms."""

import host_scores
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn import metrics as sklearn_metrics

from kdq.distill import losses
from kdq.evaluate import metrics
from kdq.tasks import build
from kdq.tasks.base import improves
from kdq.tasks.classification import BRIER, TOP5

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(scale=3, size=(40, 8)).astype(np.float32)
TEACHER = RNG.normal(scale=3, size=(40, 8)).astype(np.float32)
LABELS = RNG.integers(0, 8, 40).astype(np.int32)
TASK = build("classification")
BATCH = {"label": LABELS}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_in_closed_form(smoothing):
    y = (1 - smoothing) * np.eye(8)[LABELS] + smoothing / 8
    expected = -(y * log_softmax(LOGITS.astype(np.float64), -1)).sum(-1)
    loss = TASK.loss(LOGITS, BATCH, label_smoothing=smoothing)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda z: TASK.loss(z, BATCH, label_smoothing=smoothing).sum())(LOGITS)
    np.testing.assert_allclose(gradient, softmax(LOGITS.astype(np.float64), -1) - y, atol=1e-6)
    # The one cross-entropy of kdq, to the bit.
    np.testing.assert_array_equal(loss, losses.cross_entropy(LOGITS, LABELS, smoothing))


def test_scores_are_those_of_scikit_learn():
    scores = TASK.scores(LOGITS, BATCH)
    p = softmax(LOGITS.astype(np.float64), -1)
    values = {metric.name: metric.compute(scores) for metric in (*TASK.metrics, TOP5, BRIER)}
    assert values == pytest.approx(
        {
            "accuracy": sklearn_metrics.accuracy_score(LABELS, p.argmax(-1)),
            "nll": sklearn_metrics.log_loss(LABELS, p, labels=range(8)),
            "top5_accuracy": sklearn_metrics.top_k_accuracy_score(LABELS, p, k=5, labels=range(8)),
            "brier": np.mean(np.sum((p - np.eye(8)[LABELS]) ** 2, -1)),
        },
        rel=1e-6,
    )
    np.testing.assert_allclose(scores["confidence"], p.max(-1), rtol=1e-6)
    np.testing.assert_array_equal(scores["predicted"], p.argmax(-1))
    np.testing.assert_array_equal(scores["label"], LABELS)


def test_scores_and_divergence_are_those_of_the_host():
    scores, divergence = TASK.scores(LOGITS, BATCH), TASK.divergence(LOGITS, TEACHER)
    np.testing.assert_allclose(scores["nll"], host_scores.nll(LOGITS, LABELS), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores["correct"], metrics.correct(LOGITS, LABELS))
    np.testing.assert_allclose(
        divergence["kl"], host_scores.kl_divergence(TEACHER, LOGITS), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(divergence["agreement"], host_scores.agreement(LOGITS, TEACHER))
    np.testing.assert_allclose(divergence["noise"], ((LOGITS - TEACHER) ** 2).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(divergence["signal"], (TEACHER**2).sum(-1), rtol=1e-5)


def test_positions_are_predictions_as_examples_are():
    tokens = {"label": LABELS.reshape(8, 5)}
    logits, teacher = LOGITS.reshape(8, 5, 8), TEACHER.reshape(8, 5, 8)
    for name, value in TASK.scores(logits, tokens).items():
        np.testing.assert_array_equal(value.reshape(-1), TASK.scores(LOGITS, BATCH)[name])
    for name, value in TASK.divergence(logits, teacher).items():
        np.testing.assert_array_equal(value.reshape(-1), TASK.divergence(LOGITS, TEACHER)[name])
    np.testing.assert_array_equal(TASK.loss(logits, tokens).reshape(-1), TASK.loss(LOGITS, BATCH))


def test_a_class_that_is_ruled_out_counts_for_nothing():
    ruled_out = LOGITS.copy()
    ruled_out[:, 7] = -np.inf
    label = np.where(LABELS == 7, 0, LABELS)
    scores = TASK.scores(ruled_out, {"label": label})
    without = TASK.scores(LOGITS[:, :7], {"label": label})
    for name in without:
        np.testing.assert_allclose(scores[name], without[name], rtol=1e-6, err_msg=name)
    assert np.isposinf(TASK.loss(ruled_out, {"label": np.full(40, 7)})).all()
    gradient = jax.grad(lambda z: TASK.loss(z, {"label": label}).sum())(ruled_out)
    assert np.isfinite(gradient).all()
    # Both rule it out: as if it were not there. Only the student: it has no mass where p has.
    both = TASK.divergence(ruled_out, np.where(ruled_out == -np.inf, ruled_out, TEACHER))
    alone = TASK.divergence(LOGITS[:, :7], TEACHER[:, :7])
    np.testing.assert_allclose(both["kl"], alone["kl"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(both["noise"], alone["noise"], rtol=1e-6)
    assert np.isposinf(TASK.divergence(ruled_out, TEACHER)["kl"]).all()


def test_a_diverged_model_is_never_correct_and_agrees_with_nobody():
    logits = jnp.array([[jnp.nan, 0.0, 0, 0, 0, 0]])
    scores = TASK.scores(logits, {"label": np.array([0])})
    assert (scores["correct"], scores["top5"]) == (0, 0)
    assert np.isnan(scores["nll"])
    assert TASK.divergence(logits, jnp.zeros((1, 6)))["agreement"] == 0
    assert TASK.divergence(jnp.zeros((1, 6)), logits)["agreement"] == 0


def test_of_equal_logits_the_lower_class_comes_first():
    logits, labels = np.zeros((6, 6), np.float32), np.arange(6)
    scores = TASK.scores(logits, {"label": labels})
    assert scores["correct"].tolist() == [1, 0, 0, 0, 0, 0]
    assert scores["top5"].tolist() == [1, 1, 1, 1, 1, 0]


def test_accuracy_selects_and_between_equals_the_nll():
    good = {"accuracy": 0.9, "nll": 0.5}
    assert improves(TASK, {"accuracy": 0.91, "nll": 9.0}, good)
    assert improves(TASK, {"accuracy": 0.9, "nll": 0.4}, good)
    assert not improves(TASK, good, good)
    assert not improves(TASK, {"accuracy": 0.9, "nll": 0.6}, good)
    assert not improves(TASK, {"accuracy": 0.89, "nll": 0.0}, good)
