"""The knapsack against every policy there is."""

import dataclasses
import itertools

import numpy as np
import pytest
from problems import every_policy, feasible_policies, keeps, layered, predicted, total

from kdq.search.problem import InfeasibleError
from kdq.search.searchers import make


def ranked(problem):
    """`[(predicted, policy)]` of every policy that keeps the limits, the best first."""
    return sorted((predicted(problem, p), p) for p in feasible_policies(problem))


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
    searcher = make("knapsack", problem, seed=0, evaluations=20)
    policies = []
    while proposed := searcher.propose():
        policies += proposed
    assert len(policies) == len(expected)
    assert len(set(policies)) == len(policies)
    # Equal policies may change places: compared is what they come to.
    values = [predicted(problem, policy) for policy in policies]
    np.testing.assert_allclose(values, [value for value, _ in expected], rtol=1e-6, atol=1e-9)
    assert all(keeps(problem, policy, problem.limits) for policy in policies)


@pytest.mark.parametrize(("students", "metrics"), [(1, 1), (2, 2)])
def test_pairs_that_help_or_harm_each_other(students, metrics):
    base = layered(layers=4, bits=(2, 4, 8), students=students, metrics=metrics, budget=0.4)
    problem = with_pairs(base, seed=students)
    expected = ranked(problem)
    assert expected[0][1] != ranked(base)[0][1]  # the pairs matter
    searcher = make("knapsack_pairwise", problem, seed=0, evaluations=6)
    found = searcher.propose()
    values = [predicted(problem, policy) for policy in found]
    np.testing.assert_allclose(values, [value for value, _ in expected[:6]], rtol=1e-6)
    assert problem.predicted(found[0]) == pytest.approx(expected[0][0])


def test_knapsack_ends_when_there_are_no_more_policies():
    problem = layered(layers=2, bits=(2, 8), budget=0.9)
    searcher = make("knapsack", problem, seed=0, evaluations=50)
    count = 0
    while proposed := searcher.propose():
        count += len(proposed)
    assert count == len(ranked(problem)) == 3


def test_pool_is_the_most_it_proposes():
    searcher = make("knapsack", layered(layers=3), seed=0, evaluations=50, pool=3)
    assert len(searcher.propose()) == 3
    assert searcher.propose() == []


def named(message):
    """The budgets that a message names as the nearest."""
    nearest = message.split("the nearest that one keeps: ")[1].split(" (")[0]
    found = (part.split(" <= ") for part in nearest.split(", "))
    return {metric: float(limit) for metric, limit in found}


def refused(problem, limits):
    with pytest.raises(InfeasibleError) as caught:
        dataclasses.replace(problem, limits=limits).check()
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
    dataclasses.replace(problem, limits=nearest).check()
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
    (only,) = feasible_policies(exact)
    for name in ("random", "greedy", "knapsack", "uniform"):
        searcher = make(name, exact, seed=0, evaluations=3)
        assert set(searcher.propose()) == {only}, name
