"""Summaries and paired intervals against scipy and a closed form."""

import math

import numpy as np
import pytest
from scipy import stats

from kdq.evaluate.statistics import PairedInterval, paired_interval, summary


def test_summary_divides_by_n_minus_one():
    mean, std = summary([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))


def test_one_seed_has_no_spread_and_none_has_no_mean():
    mean, std = summary([0.5])
    assert mean == 0.5
    assert math.isnan(std)
    assert all(math.isnan(v) for v in summary([]))


def test_interval_in_closed_form():
    # Differences 1, 2, 3: mean 2, std 1, and t(0.975; 2) = 4.302653.
    interval = paired_interval({0: 2.0, 1: 4.0, 2: 6.0}, {2: 3.0, 1: 2.0, 0: 1.0})
    assert interval.mean == 2.0
    assert interval.low == pytest.approx(2 - 4.302652730 / math.sqrt(3))
    assert interval.high == pytest.approx(2 + 4.302652730 / math.sqrt(3))
    assert interval.n == 3
    assert not interval.excludes_zero


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_interval_is_that_of_the_paired_t_test(confidence):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=7), rng.normal(0.5, size=7)
    interval = paired_interval(dict(enumerate(a)), dict(enumerate(b)), confidence)
    expected = stats.ttest_rel(a, b).confidence_interval(confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_excludes_zero_on_either_side_and_for_equal_differences():
    up = paired_interval({0: 1.0, 1: 1.5}, {0: 0.5, 1: 1.0})
    assert (up.mean, up.low, up.high, up.excludes_zero) == (0.5, 0.5, 0.5, True)
    assert paired_interval({0: 0.5, 1: 1.0}, {0: 1.0, 1: 1.5}).excludes_zero
    assert not paired_interval({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).excludes_zero


def test_one_pair_has_a_difference_but_no_interval():
    interval = paired_interval({3: 0.75}, {3: 0.5})
    assert (interval.mean, interval.n) == (0.25, 1)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert not interval.excludes_zero


@pytest.mark.parametrize(
    ("a", "b", "confidence", "message"),
    [
        ({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0}, 0.95, r"seeds differ: \[0, 1\] and \[0, 2\]"),
        ({0: 1.0, 1: 1.0}, {0: 1.0}, 0.95, "seeds differ"),
        ({}, {}, 0.95, "no seeds"),
        ({0: 1.0}, {0: 1.0}, 95, r"in \(0, 1\), given 95"),
    ],
)
def test_refuses_what_is_not_paired(a, b, confidence, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(a, b, confidence)


def test_an_interval_is_written_with_its_signs():
    interval = PairedInterval(mean=0.5, low=-0.25, high=1.25, n=3)
    assert f"{interval}" == "+0.50 [-0.25, +1.25]"
    assert f"{interval:.3f}" == "+0.500 [-0.250, +1.250]"
    assert f"{interval:6.1f}" == "  +0.5 [  -0.2,   +1.2]"
