"""The environment against the problem itself, in float64; and by Gymnasium's API."""

import dataclasses
import importlib
import sys

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import layered

from kdq.search import environment
from kdq.search.gym import BitsEnv
from kdq.search.problem import ROUNDING

allowed = jax.jit(environment.allowed)
step = jax.jit(environment.step)


@jax.jit
def by_actions(env, actions):
    """Policies and projected actions, of actions [episodes, decisions, 2]."""

    def decide(state, action):
        state = environment.step(env, state, environment.nearest(env, state, action))
        return state, state.action

    def one(actions):
        state, projected = jax.lax.scan(decide, environment.reset(env), actions)
        return state.policy, projected

    return jax.vmap(one)(actions)


def with_costs(problem, costs, limit):
    return dataclasses.replace(problem, costs={"weights": costs}, limits={"weights": limit})


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    students=st.integers(1, 2),
    metrics=st.integers(1, 3),
    budget=st.floats(0.5, 1.0),
    seed=st.integers(0, 10**6),
)
def test_options_allowed_are_those_of_the_problem(students, metrics, budget, seed):
    problem = layered(
        layers=4, bits=(2, 3, 8), students=students, metrics=metrics, budget=budget, seed=seed
    )
    rng = np.random.default_rng(seed)
    env = environment.build(problem)
    for _ in range(3):
        state, taken = environment.reset(env), np.full(5, -1)
        for i, decision in enumerate(problem.decisions):
            expected = problem.allowed(taken, i)
            options = np.asarray(allowed(env, state))
            np.testing.assert_array_equal(options[: len(decision.options)], expected)
            assert not options[len(decision.options) :].any()
            taken[i] = rng.choice(np.flatnonzero(expected))
            state = step(env, state, int(taken[i]))
        assert tuple(np.asarray(state.policy)) == tuple(taken)
        assert problem.feasible(taken)


@settings(max_examples=15, deadline=None)
@given(budget=st.floats(0.3, 1.0), seed=st.integers(0, 10**6))
def test_actions_mean_the_nearest_allowed_option(budget, seed):
    problem = layered(layers=4, bits=(2, 3, 8), students=2, metrics=2, budget=budget, seed=seed)
    actions = np.random.default_rng(seed).uniform(size=(4, 5, 2)).astype(np.float32)
    policies, projected = by_actions(environment.build(problem), actions)
    for policy, target, places in zip(np.asarray(policies), actions, projected, strict=True):
        taken = np.full(5, -1)
        for i, decision in enumerate(problem.decisions):
            away = np.square(np.asarray(decision.places) - target[i]).sum(-1)
            taken[i] = np.where(problem.allowed(taken, i), away, np.inf).argmin()
            np.testing.assert_allclose(places[i], decision.places[taken[i]], rtol=1e-6)
        np.testing.assert_array_equal(policy, taken)


@pytest.mark.parametrize(("beyond", "fits"), [(0, True), (1, False)])
def test_budgets_hold_to_the_last_of_more_digits_than_float32_has(beyond, fits):
    problem = layered(layers=3, bits=(2, 4, 8), budget=1.0)
    costs = problem.costs["weights"].copy()
    costs[0, 1:, :3] = 10**9 * np.array([[2, 4, 8]]) + np.array([[1, 2, 7]])
    wanted = (0, 1, 2, 1)
    total = costs[0, range(4), wanted].sum()
    env = environment.build(with_costs(problem, costs, total - beyond))
    places = np.array([d.places[o] for d, o in zip(problem.decisions, wanted, strict=True)])
    policies, _ = by_actions(env, places[None].astype(np.float32))
    assert (tuple(np.asarray(policies[0])) == wanted) == fits


def test_the_only_policy_is_found_though_rounding_keeps_it_from_the_limit():
    problem = layered(layers=4, bits=(8, 3, 2), seed=3)
    costs = problem.costs["weights"] / 3 + problem.valid * 0.1
    least = float(costs[0, range(5), [0, 2, 2, 2, 2]].sum())
    # As far beyond the limit as a policy may be.
    limit = least / (1 + ROUNDING)
    while least > limit + ROUNDING * limit:
        limit = np.nextafter(limit, np.inf)
    tight = with_costs(problem, costs, float(limit))
    policies, _ = by_actions(environment.build(tight), jnp.ones((1, 5, 2)))
    assert tuple(np.asarray(policies[0])) == tight.reserve == (0, 2, 2, 2, 2)


def test_observations_are_what_is_documented():
    problem = layered(layers=2, bits=(2, 4, 8), budget=0.5)
    costs = np.zeros_like(problem.costs["weights"])
    costs[0, 1:, :3] = [[20, 40, 80], [10, 20, 40]]
    sensitivity = np.zeros_like(problem.sensitivity)
    sensitivity[0, 1:, :3] = [[1.0, 1e-3, 0.0], [0.1, 1e-9, 0.0]]
    problem = dataclasses.replace(with_costs(problem, costs, 75.0), sensitivity=sensitivity)
    env, state = environment.build(problem), None
    found = []
    for option in (0, 1):
        state = environment.reset(env) if state is None else state
        found.append(environment.observe(env, state))
        state = environment.step(env, state, jnp.int32(option))
    found.append(environment.observe(env, state))
    features = problem.features[0]
    expected = [
        # Of 75 bits 30 are needed, and 60 + 30 more could be spent.
        [*features[0], 0.0, 45 / 90, 0, 0, 0, 0],
        [*features[1], 0.5, 45 / 90, 0, 0, 1, 0.5],
        # The first layer took 20 of what was left.
        [*features[2], 1.0, 25 / 30, 1 / 3, 1, 5 / 6, 0],
    ]
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-6)
    blind = environment.build(dataclasses.replace(problem, sensitivity=None))
    np.testing.assert_array_equal(environment.observe(blind, state)[-2:], 0)


class TestGymnasium:
    @pytest.mark.parametrize("mode", ["continuous", "discrete"])
    def test_its_checker_passes(self, mode):
        problem = layered(layers=3, bits=(2, 4, 8), students=2, metrics=2, budget=0.6)
        env = BitsEnv(problem, lambda policies: [problem.predicted(p) for p in policies], mode)
        check_env(env, skip_render_check=True)

    @pytest.mark.parametrize("mode", ["continuous", "discrete"])
    def test_an_agent_earns_minus_the_score_within_the_budgets(self, mode):
        problem = layered(layers=4, students=2, metrics=2, budget=0.5, seed=1)
        env = BitsEnv(problem, lambda policies: [problem.predicted(p) for p in policies], mode)
        env.action_space.seed(0)
        for episode in range(10):
            _, info = env.reset(seed=episode)
            masks, actions, earned, ended = [], [], [], False
            while not ended:
                masks.append(info["action_mask"])
                _, reward, ended, truncated, info = env.step(env.action_space.sample())
                assert not truncated
                earned.append(reward), actions.append(info["action"])
            policy = info["policy"]
            assert problem.feasible(policy)
            assert earned == [0.0] * 4 + [-problem.predicted(policy)]
            assert info["costs"] == problem.total(policy)
            assert all(mask[option] for mask, option in zip(masks, policy, strict=True))
            if mode == "discrete":
                assert tuple(actions) == policy
            else:
                places = [d.places[o] for d, o in zip(problem.decisions, policy, strict=True)]
                np.testing.assert_allclose(actions, 2 * np.array(places) - 1, atol=1e-6)

    def test_mistakes_are_named(self):
        problem = layered(layers=1)
        with pytest.raises(ValueError, match=r"'discreet'.*did you mean 'discrete'"):
            BitsEnv(problem, lambda policies: [0.0], "discreet")
        env = BitsEnv(problem, lambda policies: [0.0], "discrete")
        env.reset()
        with pytest.raises(gymnasium.error.InvalidAction, match="6: expected 0 to 5"):
            env.step(6)
        env.step(0)
        env.step(0)
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(0)

    def test_without_it_the_error_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gymnasium", None)
        monkeypatch.delitem(sys.modules, "kdq.search.gym", raising=False)
        with pytest.raises(ImportError, match=r"pip install 'kdq\[search\]'"):
            importlib.import_module("kdq.search.gym")
