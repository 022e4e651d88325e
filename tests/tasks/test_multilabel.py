"""Multi-label classification against scikit-learn, float64 NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from sklearn import metrics as sklearn_metrics

from kdq.tasks import build, multilabel

RNG = np.random.default_rng(0)
LABELS = (RNG.random((60, 5)) < [0.5, 0.3, 0.1, 0.9, 0.5]).astype(np.float32)
LOGITS = (RNG.normal(size=(60, 5)) + LABELS).astype(np.float32)
TEACHER = RNG.normal(scale=2, size=(60, 5)).astype(np.float32)
TASK = build("multilabel")
BATCH = {"label": LABELS}


def _kl(p_logits, q_logits):
    p, q = expit(p_logits.astype(np.float64)), expit(q_logits.astype(np.float64))
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_in_closed_form(smoothing):
    y = (1 - smoothing) * LABELS + smoothing / 2
    q = expit(LOGITS.astype(np.float64))
    expected = -(y * np.log(q) + (1 - y) * np.log(1 - q)).mean(-1)
    loss = lambda z: TASK.loss(z, BATCH, label_smoothing=smoothing)
    np.testing.assert_allclose(loss(LOGITS), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda z: loss(z).sum())(LOGITS), (q - y) / 5, atol=1e-6)


def test_loss_is_finite_at_the_ends_and_certain_labels_count_for_nothing():
    logits = jnp.array([[1e4, -1e4, -jnp.inf, jnp.inf]])
    right = {"label": np.array([[1.0, 0, 0, 1]], np.float32)}
    value, gradient = jax.value_and_grad(lambda z: TASK.loss(z, right).sum())(logits)
    assert value == 0
    assert not gradient.any()
    wrong = {"label": np.array([[0.0, 1, 0, 1]], np.float32)}
    assert TASK.loss(logits, wrong) == pytest.approx(2e4 / 4)
    assert np.isposinf(TASK.loss(logits, {"label": np.array([[1.0, 0, 1, 1]], np.float32)}))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_bernoulli_kl_and_its_gradient_in_closed_form(temperature):
    scaled = lambda z: z.astype(np.float64) / temperature
    loss = lambda z: multilabel.bernoulli_kl(z, TEACHER, {}, temperature)
    expected = temperature**2 * _kl(scaled(TEACHER), scaled(LOGITS)).mean(-1)
    np.testing.assert_allclose(loss(LOGITS), expected, rtol=1e-5)
    gradient = temperature * (expit(scaled(LOGITS)) - expit(scaled(TEACHER))) / 5
    np.testing.assert_allclose(
        jax.grad(lambda z: loss(z).sum())(LOGITS), gradient, rtol=1e-4, atol=1e-6
    )


def test_two_logits_of_a_softmax_are_one_of_a_sigmoid():
    two = lambda z: np.stack([z, np.zeros_like(z)], -1)
    softmax = build("classification").divergence(two(LOGITS), two(TEACHER))["kl"].mean(-1)
    np.testing.assert_allclose(TASK.divergence(LOGITS, TEACHER)["kl"], softmax, rtol=1e-5)


def test_metrics_are_those_of_scikit_learn():
    scores = TASK.scores(LOGITS, BATCH)
    values = {metric.name: metric.compute(scores) for metric in TASK.metrics}
    predicted = LOGITS > 0
    assert values == pytest.approx(
        {
            "mean_average_precision": sklearn_metrics.average_precision_score(LABELS, LOGITS),
            "micro_f1": sklearn_metrics.f1_score(LABELS, predicted, average="micro"),
            "macro_f1": sklearn_metrics.f1_score(LABELS, predicted, average="macro"),
            "nll": np.mean(
                [
                    sklearn_metrics.log_loss(y, expit(z))
                    for y, z in zip(LABELS.T, LOGITS.T, strict=True)
                ]
            ),
        },
        rel=1e-6,
    )


def test_tied_scores_enter_together_as_in_scikit_learn():
    logits = np.round(LOGITS)
    assert len(np.unique(logits)) < 10
    value = multilabel.MEAN_AVERAGE_PRECISION.compute(TASK.scores(logits, BATCH))
    expected = sklearn_metrics.average_precision_score(LABELS, logits)
    assert value == pytest.approx(expected, rel=1e-12)


def test_influence_on_average_precision_is_its_derivative_by_a_weight():
    logits = np.round(2 * LOGITS) / 2
    scores = TASK.scores(logits, BATCH)
    parts = multilabel.MEAN_AVERAGE_PRECISION.contributions(scores)
    value = sklearn_metrics.average_precision_score(LABELS, logits)
    for i in (0, 17, 59):
        weights = np.ones(60)
        weights[i] += 1e-5
        moved = sklearn_metrics.average_precision_score(LABELS, logits, sample_weight=weights)
        assert (moved - value) / (1e-5 / 60) == pytest.approx(parts[i] - value, rel=1e-3)


def test_labels_that_never_occur():
    labels, logits = LABELS.copy(), LOGITS.copy()
    labels[:, 0], logits[:, 0] = 0, -1
    scores = TASK.scores(logits, {"label": labels})
    # Without a precision, it is left out of the mean of these.
    value = multilabel.MEAN_AVERAGE_PRECISION.compute(scores)
    expected = sklearn_metrics.average_precision_score(labels[:, 1:], logits[:, 1:])
    assert value == pytest.approx(expected, rel=1e-12)
    # Its F1 is 0, as scikit-learn has it.
    expected = sklearn_metrics.f1_score(labels, logits > 0, average="macro", zero_division=0)
    assert multilabel.MACRO_F1.compute(scores) == pytest.approx(expected)
    nobody = TASK.scores(logits, {"label": np.zeros_like(labels)})
    assert np.isnan(multilabel.MEAN_AVERAGE_PRECISION.compute(nobody))


def test_a_nan_is_no_prediction():
    logits = LOGITS.copy()
    logits[3, 2] = np.nan
    values = {m.name: m.compute(TASK.scores(logits, BATCH)) for m in TASK.metrics}
    assert np.isnan([values["mean_average_precision"], values["nll"]]).all()
    agreement = TASK.divergence(logits, logits)["agreement"]
    assert agreement[3] == pytest.approx(4 / 5)
