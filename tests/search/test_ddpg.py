"""DDPG against known optima, chance, and the values that its critic has to learn."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import interacting, layered, random_policies, search
from scipy import stats

from kdq.search import environment, programs
from kdq.search.searchers import ddpg
from kdq.search.searchers.ddpg import DDPG
from kdq.search.searchers.networks import rewards

BITS = (2, 3, 4, 6, 8)
SLOW = [pytest.param(1, metrics, marks=pytest.mark.slow) for metrics in (1, 2)]
QUICK = {"hidden": (8,), "updates": 2, "batch_size": 8, "replay": 16}

LEARNER = ddpg.Learner(
    hidden=(16,),
    actor_learning_rate=3e-3,
    critic_learning_rate=1e-2,
    tau=0.1,
    batch_size=32,
    imitate=0.0,
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimum_is_found_to_within_two_percent(seed):
    problem = layered(layers=8, bits=BITS, seed=seed)
    optimum = problem.predicted(programs.best(problem))
    found = search(DDPG(problem, seed=seed, evaluations=400), problem.predicted)
    assert min(found.values()) <= 1.02 * optimum
    # Which as many by chance do not.
    assert min(map(problem.predicted, random_policies(problem, 400, seed))) > 1.02 * optimum


@pytest.mark.slow
def test_what_layers_do_to_each_other_is_found_out():
    """The sensitivities that it observes know nothing of it."""
    problem, score = interacting(BITS)
    everything = itertools.product(*(range(len(d.options)) for d in problem.decisions))
    optimum = min(score(policy) for policy in everything if problem.feasible(policy))
    alone = score(programs.best(problem))
    found = min(search(DDPG(problem, seed=0, evaluations=400), score).values())
    assert found <= 1.02 * optimum
    assert alone > 1.1 * optimum


@pytest.mark.slow
def test_without_sensitivities_it_still_beats_chance():
    problem = layered(layers=8, bits=BITS)
    blind = dataclasses.replace(problem, sensitivity=None)
    found = search(DDPG(blind, seed=0, evaluations=400), problem.predicted)
    optimum = problem.predicted(programs.best(problem))
    chance = min(map(problem.predicted, random_policies(problem, 400, 0)))
    assert min(found.values()) - optimum < 0.5 * (chance - optimum)


@pytest.mark.parametrize(("students", "metrics"), [(2, 3), *SLOW])
def test_budgets_are_never_exceeded(students, metrics):
    @settings(max_examples=6, deadline=None)
    @given(budget=st.floats(0.3, 1.0), seed=st.integers(0, 10**6))
    def check(budget, seed):
        problem = layered(
            layers=3, bits=BITS, students=students, metrics=metrics, budget=budget, seed=seed
        )
        found = search(DDPG(problem, seed=seed, evaluations=24, **QUICK), problem.predicted)
        for policy in found:
            for metric, total in problem.total(policy).items():
                assert total <= problem.limits[metric] * (1 + 1e-12)

    check()


@pytest.mark.slow
def test_a_seed_decides_everything_and_the_unit_of_scores_nothing():
    problem = layered(layers=5, bits=BITS)

    def run(seed, unit=1.0):
        searcher = DDPG(problem, seed=seed, evaluations=40, **QUICK)
        return list(search(searcher, lambda policy: unit * problem.predicted(policy)))

    assert run(0) == run(0) == run(0, unit=1000.0)
    assert run(0) != run(1)


@pytest.mark.slow
def test_as_many_policies_as_evaluations_and_new_ones_while_there_are():
    problem = layered(layers=2, bits=(2, 4, 8), budget=1.0)
    searcher, found = DDPG(problem, seed=0, evaluations=20, noise=1.0, **QUICK), []
    while policies := searcher.propose():
        assert len(policies) == 1
        found += policies
        searcher.observe(policies, [np.nan])
    assert len(found) == 20
    assert len(set(found)) >= 8
    searcher.observe([], [])
    assert searcher.propose() == []


@pytest.mark.slow
def test_without_noise_actions_are_the_actors_own_and_those_stored_are_projected():
    problem = layered(layers=4, bits=(2, 8), budget=0.9)
    env, key = environment.build(problem), jax.random.key(0)
    learner = dataclasses.replace(LEARNER, hidden=(8,))
    agent = ddpg.create(learner, env, 4, key)
    noise = np.array([0.0] * 4 + [np.inf] * 200, np.float32)
    policies, observations, actions = ddpg.episodes(learner, agent.actor, env, key, noise)
    assert len(set(map(tuple, np.asarray(policies[:4]).tolist()))) == 1
    for i in (0, 100):
        places = [d.places[o] for d, o in zip(problem.decisions, policies[i], strict=True)]
        np.testing.assert_allclose(actions[i], places)
    # Both options of the first layer are allowed: of uniform actions a half means each.
    share = np.mean(np.asarray(policies[4:, 1]) == 1)
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(200)
    wanted = learner.act(agent.actor, observations[0, 1])
    state = environment.step(env, environment.reset(env), jnp.int32(0))
    assert policies[0, 1] == environment.nearest(env, state, wanted)


@pytest.mark.slow
def test_the_critic_learns_the_rewards_to_come():
    """γ is 1: what a reward is beyond the baseline, shared out, and the value of what is next."""
    problem = layered(layers=2, bits=(2, 8), budget=1.0)
    env = environment.build(problem)
    learner = dataclasses.replace(LEARNER, hidden=(32,), actor_learning_rate=0.0)
    agent = ddpg.create(learner, env, 4, jax.random.key(1))
    # One reward for each of the four policies; the last layer decides it.
    rewards, baseline = np.array([-1.0, 1.0, -1.0, 1.0], np.float32), np.float32(0.75)
    episodes = []
    for i, (one, other) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        state, seen, done = environment.reset(env), [], []
        for option in (0, one, other):
            seen.append(environment.observe(env, state))
            state = environment.step(env, state, jnp.int32(option))
            done.append(state.action)
        episodes.append((jnp.stack(seen), jnp.stack(done)))
        agent = ddpg.learn(
            learner,
            agent,
            *episodes[-1],
            rewards,
            np.zeros(1, np.int32),
            baseline,
            i + 1,
            3000 if i == 3 else 0,
            jax.random.key(2),
        )
    for (seen, done), reward in zip(episodes, rewards, strict=True):
        values = learner.value(agent.critic, seen, done)
        np.testing.assert_allclose(values[2], (reward - baseline) / 3, atol=0.1)
        # Of each first layer's two episodes the rewards cancel, and so of all four.
        then = learner.value(agent.critic, seen, learner.act(agent.actor, seen))
        np.testing.assert_allclose(values[1], -baseline / 3 + then[2], atol=0.1)
    first = np.mean([learner.value(agent.critic, *one)[0] for one in episodes])
    then = [learner.value(agent.critic, s, learner.act(agent.actor, s))[1] for s, _ in episodes]
    np.testing.assert_allclose(first, -baseline / 3 + np.mean(then), atol=0.1)


@pytest.mark.slow
def test_the_actor_climbs_the_value_or_follows_the_best():
    """One decision of two options, good and bad: the actor moves to the good one's place."""
    problem = layered(layers=1, bits=(2, 8), budget=1.0)
    env, key = environment.build(problem), jax.random.key(0)
    state = environment.step(env, environment.reset(env), jnp.int32(0))
    observation = environment.observe(env, state)
    first = environment.observe(env, environment.reset(env))
    for imitate, best, good in ((0.0, 0, 1), (1e4, 0, 0)):
        learner = dataclasses.replace(LEARNER, imitate=imitate)
        agent = ddpg.create(learner, env, 2, key)
        rewards = np.array([-1.0, 1.0], np.float32)  # of 2 bits, of 8
        for i, updates in enumerate((0, 400)):
            places = jnp.array([[0.0, 0.0], [float(i), 1.0]])
            agent = ddpg.learn(
                learner,
                agent,
                jnp.stack([first, observation]),
                places,
                rewards,
                np.array([best], np.int32),
                np.float32(0.0),
                i + 1,
                updates,
                key,
            )
        assert abs(learner.act(agent.actor, observation)[0] - good) < 0.2


def test_rewards_are_normal_quantiles_of_ranks():
    scores = [3.0, 1e9, -5.0, 3.0, np.nan, np.inf]
    # How many are worse, and half of those that are equal, itself included.
    shares = np.array([3 + 1, 2 + 0.5, 5 + 0.5, 3 + 1, 0 + 1, 0 + 1]) / 6
    np.testing.assert_allclose(rewards(scores, 8), [*stats.norm.ppf(shares), 0, 0], rtol=1e-5)
    np.testing.assert_array_equal(rewards(scores, 6), rewards([1e3 * s for s in scores], 6))
