"""Summaries and paired intervals against scipy and a closed form."""

import math

import numpy as np
import pytest
from scipy import stats

from kdq.evaluate import statistics
from kdq.evaluate.statistics import (
    BOTH,
    EXAMPLES,
    SEEDS,
    PairedInterval,
    crossed_interval,
    holm,
    paired_interval,
    summary,
)


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
    assert interval.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert interval.over == SEEDS


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
    assert math.isnan(interval.p_value)
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


REPLICATES = 4000


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(
    "share", [0.0, 0.1, 0.5, 0.9, 1.0], ids=lambda share: f"{share:.0%} of seeds"
)
def test_an_interval_over_seeds_and_examples_covers_what_it_says(seeds, share):
    """Differences of 60 examples; `share` of the mean's variance is the seeds', else the examples'.

    The interval over seeds alone fails this wherever the examples matter.
    """
    examples = 60
    rng = np.random.default_rng((seeds, int(10 * share)))
    draw = lambda *shape: rng.normal(size=(REPLICATES, *shape))
    values = 0.3 + draw(seeds, 1) * np.sqrt(share * seeds)
    values = values + draw(1, examples) * np.sqrt((1 - share) * examples)
    values += draw(seeds, examples)
    mean, half, p_value = statistics.crossed(values)
    covers = np.abs(mean - 0.3) <= half
    assert 0.93 < covers.mean() < 0.97
    # The p-value and the interval say the same.
    np.testing.assert_array_equal(p_value < 0.05, np.abs(mean) > half)
    if share <= 0.5:
        by_seed = values.mean(-1)
        error = by_seed.std(-1, ddof=1) / np.sqrt(seeds)
        over_seeds, _ = statistics.student_t(mean, error, seeds - 1, 0.95)
        assert np.mean(np.abs(mean - 0.3) <= over_seeds) < 0.93


@pytest.mark.parametrize("size", [1, 8])
def test_an_interval_over_documents_covers_though_their_tokens_vary_together(size):
    """Of right-or-wrong answers, in documents of 1 to 2 * `size` - 1 tokens."""
    rng = np.random.default_rng(size)
    covered, covered_tokens = [], []
    for _ in range(400):
        lengths = rng.integers(1, 2 * size, 80)
        document = np.repeat(np.arange(80), lengths)
        # The chance of being right is a document's.
        chance = rng.beta(0.5, 0.5, 80)[document]
        answers = {seed: (rng.random(len(document)) < chance) - 0.5 for seed in range(3)}
        by_document = crossed_interval(answers, document)
        covered.append(by_document.low <= 0 <= by_document.high)
        by_token = crossed_interval(answers)
        covered_tokens.append(by_token.low <= 0 <= by_token.high)
        expected = np.mean([row.mean() for row in answers.values()])
        assert by_document.mean == pytest.approx(expected, abs=1e-12)
    assert 0.92 < np.mean(covered) < 0.985
    assert (np.mean(covered_tokens) < 0.8) == (size == 8)


def test_mean_squares_by_hand():
    # Rows of seeds with means 1 and 3, columns of examples with means 0, 2 and 4.
    values = np.array([[-1.0, 1.5, 2.5], [1.0, 2.5, 5.5]])
    interval = crossed_interval(dict(enumerate(values)), confidence=0.9)
    ms_a = 3 * ((1 - 2) ** 2 + (3 - 2) ** 2) / 1
    ms_b = 2 * (4 + 0 + 4) / 2
    residual = values - [[1], [3]] - np.array([0, 2, 4]) + 2
    ms_e = (residual**2).sum() / 2
    variance = (ms_a + ms_b - ms_e) / 6
    degrees = (ms_a + ms_b - ms_e) ** 2 / (ms_a**2 / 1 + ms_b**2 / 2 + ms_e**2 / 2)
    both = stats.t.ppf(0.95, degrees) * math.sqrt(variance)
    seeds = stats.t.ppf(0.95, 1) * math.sqrt(ms_a / 6)
    assert interval.mean == pytest.approx(2)
    assert interval.high - 2 == pytest.approx(max(both, seeds))
    assert (interval.n, interval.over) == (2, BOTH)


def test_it_is_never_narrower_than_the_interval_over_seeds():
    rng = np.random.default_rng(0)
    for scale in (0, 0.1, 1, 10):
        values = rng.normal(size=(4, 1)) + scale * rng.normal(size=(4, 20))
        means = dict(enumerate(values.mean(1)))
        seeds = paired_interval(means, dict.fromkeys(means, 0.0))
        both = crossed_interval(dict(enumerate(values)))
        assert both.mean == pytest.approx(seeds.mean)
        assert both.high - both.low >= (seeds.high - seeds.low) * (1 - 1e-12)
        assert both.p_value >= seeds.p_value * (1 - 1e-9)


def test_of_one_seed_the_interval_is_over_examples_and_says_so():
    values = np.random.default_rng(0).normal(0.3, size=50)
    interval = crossed_interval({7: values})
    expected = stats.ttest_1samp(values, 0)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert interval.p_value == pytest.approx(expected.pvalue)
    assert (interval.n, interval.over) == (1, EXAMPLES)


def test_arms_that_are_alike_everywhere_differ_by_nothing():
    interval = crossed_interval({0: np.zeros(5), 1: np.zeros(5)})
    assert (interval.low, interval.high, interval.p_value) == (0, 0, 1)
    assert not interval.excludes_zero
    assert crossed_interval({0: np.ones(5), 1: np.ones(5)}).p_value == 0


@pytest.mark.parametrize(
    ("differences", "examples", "message"),
    [
        ({}, None, "no seeds"),
        ({0: np.zeros(3), 1: np.zeros(4)}, None, r"got \[\(3,\), \(4,\)\]"),
        ({0: np.zeros(1)}, None, "at least 2 examples, got 1"),
        ({0: np.zeros(3)}, [5, 5, 5], "at least 2 examples, got 1"),
        ({0: np.zeros(3)}, [1, 2], r"got \(2,\)"),
    ],
)
def test_refuses_what_is_not_crossed(differences, examples, message):
    with pytest.raises(ValueError, match=message):
        crossed_interval(differences, examples)


def test_holm_by_hand():
    # 0.005 * 4; 0.01 * 3; 0.03 * 2; 0.04 * 1, which may not fall below the one before.
    adjusted = holm({"c": 0.03, "a": 0.005, "d": 0.04, "b": 0.01, "not made": math.nan})
    assert list(adjusted) == ["c", "a", "d", "b", "not made"]
    expected = {"a": 0.02, "b": 0.03, "c": 0.06, "d": 0.06, "not made": math.nan}
    assert adjusted == pytest.approx(expected, nan_ok=True)
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_keeps_the_familywise_error():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 1)) + rng.normal(size=(4000, 6))  # with much in common
    p_values = 2 * stats.norm.sf(np.abs(z) / math.sqrt(2))
    errors = [min(holm(dict(enumerate(row))).values()) < 0.05 for row in p_values]
    assert 0.02 < np.mean(errors) < 0.05 + 0.01
    assert np.mean(p_values.min(1) < 0.05) > 0.12  # without it
