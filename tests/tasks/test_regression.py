"""Regression against scikit-learn, scipy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import huber
from sklearn import metrics as sklearn_metrics

from kdq.tasks import build

RNG = np.random.default_rng(0)
TARGETS = (RNG.normal(size=(50, 3)) * [1, 20, 5] + [10, -300, 0]).astype(np.float32)
FACTS = build("regression").target_facts(lambda: TARGETS)
BATCH = {"label": TARGETS}
TASK = build("regression").with_facts(FACTS)
STANDARD = (TARGETS - TARGETS.astype(np.float64).mean(0)) / TARGETS.astype(np.float64).std(0)
OUTPUTS = (STANDARD + RNG.normal(scale=0.5, size=(50, 3))).astype(np.float32)
TEACHER = (STANDARD + RNG.normal(scale=0.4, size=(50, 3))).astype(np.float32)
UNITS = OUTPUTS * np.asarray(FACTS["target_std"]) + np.asarray(FACTS["target_mean"])


def test_squared_loss_and_its_gradient_are_of_standardized_targets():
    error = OUTPUTS - STANDARD
    np.testing.assert_allclose(TASK.loss(OUTPUTS, BATCH), (error**2).mean(-1), rtol=1e-4)
    gradient = jax.grad(lambda z: TASK.loss(z, BATCH).sum())(OUTPUTS)
    np.testing.assert_allclose(gradient, 2 * error / 3, atol=1e-5)


@pytest.mark.parametrize("delta", [0.3, 1.0])
def test_huber_loss_is_twice_that_of_scipy(delta):
    task = build("regression", error="huber", delta=delta).with_facts(FACTS)
    error = OUTPUTS - STANDARD
    np.testing.assert_allclose(
        task.loss(OUTPUTS, BATCH), 2 * huber(delta, error).mean(-1), rtol=1e-4
    )
    gradient = jax.grad(lambda z: task.loss(z, BATCH).sum())(OUTPUTS)
    np.testing.assert_allclose(gradient, 2 * np.clip(error, -delta, delta) / 3, atol=1e-5)
    # Also where the error is exactly 0 or δ.
    edge = jax.grad(
        lambda z: build("regression", error="huber").loss(z, {"label": jnp.zeros(3)}).sum()
    )(jnp.array([[0.0], [1.0], [-1.0]]))
    np.testing.assert_array_equal(edge, [[0], [2], [-2]])


def test_metrics_are_those_of_scikit_learn_in_own_units():
    scores = TASK.scores(OUTPUTS, BATCH)
    values = {metric.name: metric.compute(scores) for metric in TASK.metrics}
    assert values == pytest.approx(
        {
            "rmse": sklearn_metrics.root_mean_squared_error(TARGETS, UNITS),
            "mae": sklearn_metrics.mean_absolute_error(TARGETS, UNITS),
            "r2": sklearn_metrics.r2_score(TARGETS, UNITS),
        },
        rel=1e-4,
    )


def test_one_target_may_lack_its_axis():
    task = build("regression")
    task = task.with_facts(task.target_facts(lambda: TARGETS[:, 0]))
    flat = task.scores(OUTPUTS[:, :1], {"label": TARGETS[:, 0]})
    column = task.scores(OUTPUTS[:, :1], {"label": TARGETS[:, :1]})
    for name, value in flat.items():
        np.testing.assert_array_equal(value, column[name])


def test_facts_fill_in_what_a_config_leaves_open():
    assert len(TASK.mean) == len(TASK.std) == 3
    chosen = build("regression", mean=[1.0], std=[2.0])
    assert chosen.with_facts(FACTS) is chosen
    assert build("regression").with_facts({}) == build("regression")
    constant = build("regression")
    constant = constant.with_facts(constant.target_facts(lambda: np.ones(4)))
    assert constant.std == (1.0,)
    assert constant.loss(np.zeros((4, 1)), {"label": np.ones(4)}).tolist() == [0] * 4
    assert build("regression", unit="mm").primary.text(3.25) == "3.250 mm"


def test_distance_from_a_teacher_is_in_own_units():
    teacher = TEACHER * np.asarray(FACTS["target_std"])
    scores = TASK.divergence(OUTPUTS, TEACHER)
    expected = sklearn_metrics.root_mean_squared_error(
        teacher, OUTPUTS * np.asarray(FACTS["target_std"])
    )
    assert TASK.fidelity[0].compute(scores) == pytest.approx(expected, rel=1e-5)
    noise = np.sum((OUTPUTS - TEACHER) ** 2) / np.sum(TEACHER**2)
    assert TASK.fidelity[1].compute(scores) == pytest.approx(noise, rel=1e-5)


def test_squared_error_to_a_teacher():
    loss = lambda z: TASK.distillation["squared_error"](z, TEACHER, BATCH)
    np.testing.assert_allclose(loss(OUTPUTS), ((OUTPUTS - TEACHER) ** 2).mean(-1), rtol=1e-6)
    gradient = jax.grad(lambda z: loss(z).sum())(OUTPUTS)
    np.testing.assert_allclose(gradient, 2 * (OUTPUTS - TEACHER) / 3, rtol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_teacher_bounded_loss_and_gradient_in_closed_form(margin):
    loss = lambda z: TASK.distillation["teacher_bounded"](z, TEACHER, BATCH, margin)
    error = ((OUTPUTS - STANDARD) ** 2).mean(-1)
    worse = error + margin > ((TEACHER - STANDARD) ** 2).mean(-1)
    assert 0 < worse.sum() < 50
    np.testing.assert_allclose(loss(OUTPUTS), np.where(worse, error, 0), rtol=1e-4)
    gradient = jax.grad(lambda z: loss(z).sum())(OUTPUTS)
    expected = np.where(worse[:, None], 2 * (OUTPUTS - STANDARD) / 3, 0)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
