"""Totals, sizes and predictions of policies, against loops."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from problems import layered, predicted, random_policies, total


def test_totals_and_predictions_by_loops():
    problem = layered(layers=4, students=2, metrics=3)
    for policy in random_policies(problem, 10, 0):
        totals = problem.total(policy)
        for metric in problem.costs:
            assert totals[metric] == pytest.approx(total(problem, policy, metric), rel=1e-12)
        assert problem.predicted(policy) == pytest.approx(predicted(problem, policy))
        names = [d.options[o] for d, o in zip(problem.decisions, policy, strict=True)]
        assert list(problem.describe(policy).values()) == names


def test_equal_bits_keep_an_average_of_as_many():
    """Sums of floats are off by a bit or two, which is no reason to refuse the uniform policy."""
    rng, off = np.random.default_rng(0), 0
    for seed, bits in itertools.product(range(40), (2, 3, 6)):
        problem = layered(layers=8, bits=(2, 3, 6), seed=seed, budget=1.0)
        sizes = rng.integers(10, 5000, 8)
        shares = np.array([[n * b / int(sizes.sum()) for b in (2, 3, 6)] for n in sizes])
        problem.costs["weights"][0, 1:] = shares
        exact = dataclasses.replace(problem, limits={"weights": float(bits)})
        policy = (0, *[(2, 3, 6).index(bits)] * 8)
        off += total(exact, policy, "weights") > bits
        assert exact.feasible(policy)
        assert exact.projected(policy) == policy
    assert off > 0  # the case is there


def test_a_budget_of_an_unknown_cost_lists_the_known_ones():
    problem = layered(layers=2)
    with pytest.raises(ValueError, match=re.escape("'bytes': costs are known of ('weights',)")):
        dataclasses.replace(problem, limits={"bytes": 3.0})
