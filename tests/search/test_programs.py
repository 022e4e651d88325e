"""The knapsack against every policy there is."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from problems import layered

from kdq.search.problem import ROUNDING, InfeasibleError
from kdq.search.searchers import METHODS
from kdq.search.searchers.knapsack import Knapsack, PairwiseKnapsack


def every_policy(problem):
    return itertools.product(*(range(len(one.options)) for one in problem.decisions))


def total(problem, policy, metric):
    """By a loop of its own."""
    cost = problem.costs[metric]
    return problem.constants[metric][policy[0]] + sum(
        cost[policy[0], i, option] for i, option in enumerate(policy)
    )


def keeps(problem, policy, limits):
    """But for what sums of floats may be off."""
    within = all(total(problem, policy, m) <= limit * (1 + ROUNDING) for m, limit in limits.items())
    return within and all(problem.valid[policy[0], i, o] for i, o in enumerate(policy))


def predicted(problem, policy):
    """The objective in the integer program, summed in float64."""
    value = problem.base[policy[0]]
    for i, option in enumerate(policy):
        value += problem.sensitivity[policy[0], i, option]
    for (s, i, a, j, b), more in problem.pairs.items():
        value += more * (policy[0] == s and policy[i] == a and policy[j] == b)
    return value


def ranked(problem):
    """`[(predicted, policy)]` of every policy that keeps the limits, the best first."""
    found = [p for p in every_policy(problem) if keeps(problem, p, problem.limits)]
    return sorted((predicted(problem, p), p) for p in found)


def with_pairs(problem, seed):
    """Every two layers, at any options, add something by chance, often less than nothing."""
    rng = np.random.default_rng(seed)
    layers = range(1, len(problem.decisions))
    pairs = {
        (s, i, a, j, b): float(rng.normal() * problem.sensitivity.max())
        for s in range(problem.students)
        for i, j in itertools.combinations(layers, 2)
        for a in range(len(problem.decisions[i].options))
        for b in range(len(problem.decisions[j].options))
    }
    return dataclasses.replace(problem, pairs=pairs)


@pytest.mark.parametrize(
    ("students", "metrics", "budget"),
    [(1, 1, 0.0), (1, 1, 0.37), (1, 1, 1.0), (1, 2, 0.5), (2, 1, 0.3), (3, 3, 0.45)],
)
def test_knapsack_proposes_the_best_and_then_the_next_best(students, metrics, budget):
    problem = layered(
        layers=6, bits=(2, 3, 4, 8), students=students, metrics=metrics, budget=budget, seed=7
    )
    expected = ranked(problem)[:20]
    searcher = Knapsack(problem, seed=0, evaluations=20)
    found = []
    while proposed := searcher.propose():
        found += proposed
    assert len(found) == len(expected)
    assert len(set(found)) == len(found)
    # Equal policies may change places: compared is what they come to.
    values = [predicted(problem, policy) for policy in found]
    np.testing.assert_allclose(values, [value for value, _ in expected], rtol=1e-6, atol=1e-9)
    assert all(keeps(problem, policy, problem.limits) for policy in found)


@pytest.mark.parametrize(("students", "metrics"), [(1, 1), (2, 2)])
def test_pairs_that_help_or_harm_each_other(students, metrics):
    base = layered(layers=4, bits=(2, 4, 8), students=students, metrics=metrics, budget=0.4)
    problem = with_pairs(base, seed=students)
    expected = ranked(problem)
    assert expected[0][1] != ranked(base)[0][1]  # the pairs matter
    searcher = PairwiseKnapsack(problem, seed=0, evaluations=6)
    found = searcher.propose()
    values = [predicted(problem, policy) for policy in found]
    np.testing.assert_allclose(values, [value for value, _ in expected[:6]], rtol=1e-6)
    assert problem.predicted(found[0]) == pytest.approx(expected[0][0])


def test_knapsack_ends_when_there_are_no_more_policies():
    problem = layered(layers=2, bits=(2, 8), budget=0.9)
    searcher = Knapsack(problem, seed=0, evaluations=50)
    count = 0
    while proposed := searcher.propose():
        count += len(proposed)
    assert count == len(ranked(problem)) == 3


def test_pool_is_the_most_it_proposes():
    searcher = Knapsack(layered(layers=3), seed=0, evaluations=50, pool=3)
    assert len(searcher.propose()) == 3
    assert searcher.propose() == []


def named(message):
    """The budgets that a message names as the nearest."""
    nearest = message.split("the nearest that one keeps: ")[1].split(" (")[0]
    found = (part.split(" <= ") for part in nearest.split(", "))
    return {metric: float(limit) for metric, limit in found}


def refused(problem, limits):
    with pytest.raises(InfeasibleError) as caught:
        dataclasses.replace(problem, limits=limits)
    return str(caught.value)


def is_feasible(problem, limits):
    return any(keeps(problem, policy, limits) for policy in every_policy(problem))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("students", [1, 2])
def test_an_infeasible_budget_is_told_the_nearest_that_is_not(seed, students):
    problem = layered(layers=6, bits=(2, 3, 8), students=students, seed=seed, budget=1.0)
    least = min(total(problem, policy, "weights") for policy in every_policy(problem))
    message = refused(problem, {"weights": 0.6 * least})
    assert f"no policy keeps the budgets weights <= {0.6 * least:g}; " in message
    nearest = named(message)
    assert is_feasible(problem, nearest)
    assert not is_feasible(problem, {"weights": nearest["weights"] * (1 - 1e-5)})
    refused(problem, {"weights": least * (1 - 1e-9)})
    # And the problem takes it.
    assert dataclasses.replace(problem, limits=nearest).reserve
    # The policy that the message describes is one that keeps it.
    policy = message.rsplit(" (")[-1].rstrip(")").split(", ")
    assert [part.split("=")[0] for part in policy] == [one.name for one in problem.decisions]
    places = [
        one.options.index(p.split("=")[1]) for p, one in zip(policy, problem.decisions, strict=True)
    ]
    assert keeps(problem, places, nearest)


def test_of_several_budgets_the_largest_excess_is_the_least():
    problem = layered(layers=5, bits=(2, 3, 8), metrics=2, budget=1.0, seed=3)
    totals = [
        {metric: total(problem, policy, metric) for metric in problem.costs}
        for policy in every_policy(problem)
    ]
    limits = {m: 0.8 * min(one[m] for one in totals) for m in problem.costs}
    nearest = named(refused(problem, limits))
    assert is_feasible(problem, nearest)
    excess = max(nearest[m] / limits[m] for m in limits)
    best = min(max(one[m] / limits[m] for m in limits) for one in totals)
    assert excess == pytest.approx(best, rel=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_of_exactly_the_least_is_kept(seed):
    """Also where one small layer more is a millionth of the whole: the solver has tolerances."""
    problem = layered(layers=5, bits=(2, 3, 8), seed=seed, budget=1.0)
    problem.costs["weights"][0, 1] *= 2.0**12
    problem.costs["weights"][0, 2] = [2, 3, 8]
    least = min(total(problem, policy, "weights") for policy in every_policy(problem))
    exact = dataclasses.replace(problem, limits={"weights": least})
    (only,) = {p for p in every_policy(problem) if keeps(problem, p, exact.limits)}
    for name in ("random", "greedy", "knapsack", "uniform"):
        searcher = METHODS[name](exact, seed=0, evaluations=3)
        assert set(searcher.propose()) == {only}, name


def test_a_budget_of_an_unknown_cost_lists_the_known_ones():
    problem = layered(layers=2)
    with pytest.raises(ValueError, match=re.escape("'bytes': costs are known of ('weights',)")):
        dataclasses.replace(problem, limits={"bytes": 3.0})
