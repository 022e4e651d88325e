"""Budgets are kept by any policy that is completed or mended: against totals computed by loops."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import every_policy, feasible_policies, keeps, layered, limited, random_policies

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
    policy = np.full(len(problem.decisions), -1)
    for i in (0, *(1 + rng.permutation(len(policy) - 1))):
        options = np.flatnonzero(problem.allowed(policy, i))
        assert len(options)
        policy[i] = rng.choice(options)
    assert keeps(problem, tuple(policy), problem.limits)


@settings(max_examples=40, deadline=None)
@given(problem=CASES, seed=st.integers(0, 1000))
def test_projection_keeps_what_is_feasible_and_mends_the_rest(problem, seed):
    for policy in random_policies(problem, 4, seed):  # projected ones
        order = 1 + np.random.default_rng(seed).permutation(len(policy) - 1)
        assert problem.projected(policy, order) == policy
    rng = np.random.default_rng(seed)
    for _ in range(4):
        policy = tuple(int(rng.integers(len(d.options))) for d in problem.decisions)
        projected = problem.projected(policy)
        assert keeps(problem, projected, problem.limits)
        if keeps(problem, policy, problem.limits):
            assert projected == policy


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
    """The allowed options are exactly those with which some policy within the budget begins."""
    within = feasible_policies(problem)
    for length in range(len(problem.decisions)):
        for start in {p[:length] for p in within}:
            partial = np.array([*start, *[-1] * (len(problem.decisions) - length)])
            allowed = {(*start, int(o)) for o in np.flatnonzero(problem.allowed(partial, length))}
            assert allowed == {p[: length + 1] for p in within if p[:length] == start}


def test_a_problem_is_made_without_solving_a_program(monkeypatch):
    monkeypatch.setattr("kdq.search.programs.nearest", lambda *_: 1 / 0)
    problem = layered(layers=3)
    assert len(list(every_policy(problem))) == 6**3
