"""Metrics by hand: what they say, what they compare, and their influence functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.tasks import base
from kdq.tasks.metric import Metric

ACCURACY = Metric(name="accuracy", scores=("correct",), unit="%")
RMSE = Metric(
    name="rmse",
    scores=("squared_error",),
    of_mean=np.sqrt,
    unit="mg/dl",
    higher_is_better=False,
    decimals=1,
    relative=True,
    tie=1.0,
)
PERPLEXITY = Metric(name="perplexity", scores=("nll",), of_mean=np.exp, higher_is_better=False)


def test_a_share_is_a_percent_and_its_differences_are_points():
    assert ACCURACY.heading == "accuracy (%)"
    assert ACCURACY.text(0.97254) == "97.25%"
    assert ACCURACY.difference(0.95, 0.9375) == pytest.approx(1.25)
    assert ACCURACY.difference_text(ACCURACY.difference(0.95, 0.9375)) == "+1.25 points"
    assert ACCURACY.gain(0.9, 0.95) == pytest.approx(-5)
    assert ACCURACY.ties(0.95, 0.946)
    assert not ACCURACY.ties(0.95, 0.944)


def test_an_error_has_its_own_unit_and_its_differences_are_relative():
    assert RMSE.text(54.321) == "54.3 mg/dl"
    assert RMSE.difference(54.0, 60.0) == pytest.approx(-10)
    assert RMSE.difference_text(-10) == "-10.0%"
    assert RMSE.gain(54.0, 60.0) == pytest.approx(10)
    assert RMSE.better(54.0, 60.0)
    assert RMSE.ties(60.5, 60.0)
    assert not RMSE.ties(61.0, 60.0)
    assert RMSE.difference(0.0, 0.0) == 0
    assert RMSE.difference(1.0, 0.0) == math.inf


def test_any_number_is_better_than_none():
    for metric in (ACCURACY, RMSE):
        assert metric.better(0.1, math.nan)
        assert not metric.better(math.nan, 0.1)
        assert not metric.better(math.nan, math.nan)
        assert not metric.better(0.1, 0.1)


def test_values_are_functions_of_means_in_float64():
    rng = np.random.default_rng(0)
    nll = rng.exponential(size=10_000).astype(np.float32)
    scores = {"nll": nll, "squared_error": nll**2, "correct": nll < 1}
    assert PERPLEXITY.compute(scores) == pytest.approx(np.exp(nll.astype(np.float64).mean()), 1e-14)
    expected = math.sqrt((nll**2).astype(np.float64).mean())
    assert RMSE.compute(scores) == pytest.approx(expected, 1e-14)
    assert ACCURACY.compute(scores) == np.mean(nll < 1)
    assert math.isnan(ACCURACY.compute({"correct": np.zeros(0)}))


@pytest.mark.parametrize("metric", [ACCURACY, RMSE, PERPLEXITY])
def test_contributions_are_the_influence_of_each_prediction(metric):
    rng = np.random.default_rng(1)
    x = rng.exponential(size=40)
    scores = {metric.scores[0]: x}
    contributions = metric.contributions(scores)
    value = metric.compute(scores)
    assert contributions.mean() == pytest.approx(value, rel=1e-12)
    # A prediction that counts a little more, n + n ε of n, moves the value by ε (c - value).
    for i in (0, 7, 39):
        weights = np.ones(40)
        weights[i] += 1e-6
        moved = metric.from_means(np.average(x, weights=weights)) - value
        assert moved == pytest.approx(1e-6 / 40 * (contributions[i] - value), rel=1e-4)


@pytest.mark.parametrize("metric", [ACCURACY, RMSE])
def test_contributions_to_a_difference_are_its_influence(metric):
    rng = np.random.default_rng(2)
    a, b = rng.exponential(size=(2, 30)) + 1
    parts = metric.difference_contributions(a, b)
    expected = metric.difference(a.mean(), b.mean())
    assert parts.mean() == pytest.approx(expected, rel=1e-12)
    weights = np.ones(30)
    weights[4] += 1e-6
    moved = metric.difference(*(np.average(x, weights=weights) for x in (a, b))) - expected
    assert moved == pytest.approx(1e-6 / 30 * (parts[4] - expected), rel=1e-4)


def test_the_first_metric_that_differs_decides():
    class Both:
        metrics = (ACCURACY, PERPLEXITY)

    worse = {"accuracy": 0.5, "perplexity": 2.0}
    assert base.improves(Both, {"accuracy": 0.6, "perplexity": 9.0}, worse)
    assert base.improves(Both, {"accuracy": 0.5, "perplexity": 1.0}, worse)
    assert not base.improves(Both, worse, worse)
    assert not base.improves(Both, {"accuracy": 0.4, "perplexity": 1.0}, worse)
    assert not base.improves(Both, {"accuracy": math.nan, "perplexity": 1.0}, worse)


def test_a_weighted_sum_never_broadcasts_and_hides_what_does_not_count():
    values = jnp.array([[1.0, jnp.nan], [3.0, jnp.inf]])
    total, count = base.weighted_sum(values, jnp.array([[1.0, 0.0], [1.0, 0.0]]))
    assert (float(total), float(count)) == (4.0, 2.0)
    with pytest.raises(ValueError, match=r"got \(2, 2\) and \(2,\)"):
        base.weighted_sum(values, jnp.ones(2))
    gradient = jax.grad(lambda v: base.weighted_sum(v, jnp.array([1.0, 0.0]))[0])
    assert gradient(jnp.array([1.0, jnp.nan])).tolist() == [1.0, 0.0]


def test_masks_of_examples_and_of_positions_are_multiplied():
    batch = {"mask": np.array([1.0, 0.0]), "token_mask": np.array([[1, 1, 0], [1, 1, 1]])}
    assert base.count_all(batch, (2,)).tolist() == [1, 0]
    assert base.count_all(batch, (2, 3)).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert base.count_all({}, (2, 3)).tolist() == [[1, 1, 1]] * 2
