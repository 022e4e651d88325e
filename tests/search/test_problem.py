"""Budgets are kept, whatever is asked for: against totals computed by loops."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import layered, random_policies
from test_programs import every_policy, keeps, total


def limited(slack, seed, **sizes):
    """A problem with the budgets that a policy by chance just keeps, or a little more."""
    problem = layered(budget=1.0, seed=seed, **sizes)
    rng = np.random.default_rng(seed)
    policy = [
        int(rng.choice(np.flatnonzero(problem.valid[0, i]))) for i in range(len(problem.decisions))
    ]
    policy[0] = int(rng.integers(problem.students))
    limits = {metric: total(problem, policy, metric) * (1 + slack) for metric in problem.costs}
    return dataclasses.replace(problem, limits=limits)


CASES = st.builds(
    limited,
    layers=st.integers(1, 6),
    bits=st.sampled_from([(2, 8), (2, 3, 4), (8, 2, 4)]),
    students=st.integers(1, 3),
    metrics=st.integers(1, 3),
    slack=st.sampled_from([0.0, 0.01, 0.3]),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=40, deadline=None)
@given(problem=CASES, seed=st.integers(0, 1000))
def test_allowed_never_leaves_nothing_and_ends_within_the_limits(problem, seed):
    rng = np.random.default_rng(seed)
    found = np.full(len(problem.decisions), -1)
    for i in (0, *(1 + rng.permutation(len(found) - 1))):
        options = np.flatnonzero(problem.allowed(found, i))
        assert len(options)
        found[i] = rng.choice(options)
    assert keeps(problem, tuple(found), problem.limits)


@settings(max_examples=40, deadline=None)
@given(problem=CASES, seed=st.integers(0, 1000))
def test_projection_keeps_what_is_feasible_and_mends_the_rest(problem, seed):
    for wanted in random_policies(problem, 4, seed):  # projected ones
        order = 1 + np.random.default_rng(seed).permutation(len(wanted) - 1)
        assert problem.projected(wanted, order) == wanted
    rng = np.random.default_rng(seed)
    for _ in range(4):
        wanted = tuple(int(rng.integers(len(one.options))) for one in problem.decisions)
        found = problem.projected(wanted)
        assert keeps(problem, found, problem.limits)
        if keeps(problem, wanted, problem.limits):
            assert found == wanted


@settings(max_examples=25, deadline=None)
@given(
    problem=st.builds(
        layered,
        layers=st.integers(1, 3),
        bits=st.just((2, 4, 8)),
        students=st.integers(1, 2),
        budget=st.floats(0.0, 1.0),
        seed=st.integers(0, 10**6),
    )
)
def test_with_one_budget_every_feasible_policy_can_be_reached(problem):
    """What is allowed is exactly what some policy within the budget begins with."""
    within = {p for p in every_policy(problem) if keeps(problem, p, problem.limits)}
    for length in range(len(problem.decisions)):
        beginnings = {p[:length] for p in within}
        for start in beginnings:
            partial = np.array([*start, *[-1] * (len(problem.decisions) - length)])
            allowed = {(*start, int(o)) for o in np.flatnonzero(problem.allowed(partial, length))}
            wanted = {p[: length + 1] for p in within if p[:length] == start}
            assert allowed == wanted


def test_totals_and_predictions_by_loops():
    problem = layered(layers=4, students=2, metrics=3)
    for policy in random_policies(problem, 10, 0):
        found = problem.total(policy)
        for metric in problem.costs:
            assert found[metric] == pytest.approx(total(problem, policy, metric), rel=1e-12)
        value = sum(problem.sensitivity[policy[0], i, o] for i, o in enumerate(policy))
        assert problem.predicted(policy) == pytest.approx(problem.base[policy[0]] + value)
        names = [one.options[o] for one, o in zip(problem.decisions, policy, strict=True)]
        assert list(problem.describe(policy).values()) == names


def test_how_many_policies_there_are():
    problem = layered(layers=3, bits=(2, 4, 8), students=2, budget=1.0)
    assert problem.size == len(list(every_policy(problem))) == 2 * 27
    problem.valid[1, 2, 0] = False
    fewer = dataclasses.replace(problem)
    assert fewer.size == 27 + 18


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
