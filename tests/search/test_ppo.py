"""PPO against known optima, chance, and what its updates have to do."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import interacting, layered, random_policies, search

from kdq.search import environment, programs
from kdq.search.searchers import ppo
from kdq.search.searchers.ppo import PPO

BITS = (2, 3, 4, 6, 8)
SLOW = [pytest.param(1, metrics, marks=pytest.mark.slow) for metrics in (1, 2)]
QUICK = {"hidden": (8,), "epochs": 2}
LEARNER = ppo.Learner(hidden=(16,), options=2, learning_rate=1e-3, clip=0.2, epochs=5, imitate=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimum_is_found_to_within_two_percent(seed):
    problem = layered(seed=seed)
    optimum = problem.predicted(programs.best(problem))
    found = search(PPO(problem, seed=seed, evaluations=400), problem.predicted)
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
    found = min(search(PPO(problem, seed=0, evaluations=400), score).values())
    assert found <= 1.02 * optimum
    assert alone > 1.1 * optimum


@pytest.mark.slow
def test_without_sensitivities_it_still_beats_chance():
    problem = layered()
    blind = dataclasses.replace(problem, sensitivity=None)
    found = search(PPO(blind, seed=0, evaluations=400), problem.predicted)
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
        found = search(PPO(problem, seed=seed, evaluations=24, **QUICK), problem.predicted)
        for policy in found:
            for metric, total in problem.total(policy).items():
                assert total <= problem.limits[metric] * (1 + 1e-12)

    check()


@pytest.mark.slow
def test_a_seed_decides_everything_and_the_unit_of_scores_nothing():
    problem = layered(layers=5, bits=BITS)

    def run(seed, unit=1.0):
        searcher = PPO(problem, seed=seed, evaluations=40, **QUICK)
        return list(search(searcher, lambda policy: unit * problem.predicted(policy)))

    assert run(0) == run(0) == run(0, unit=1000.0)
    assert run(0) != run(1)


@pytest.mark.slow
def test_as_many_policies_as_evaluations_and_new_ones_while_there_are():
    problem = layered(layers=2, bits=(2, 4, 8), budget=1.0)
    searcher, found = PPO(problem, seed=0, evaluations=21, episodes=5, **QUICK), []
    while policies := searcher.propose():
        assert 1 <= len(policies) <= 5
        found += policies
        searcher.observe(policies, [np.nan] * len(policies))
    assert len(found) == 21
    assert len(set(found)) == 9


@pytest.mark.slow
def test_fewer_scores_than_policies_are_enough():
    """A search that is over may tell of the first ones only, or of none."""
    problem = layered(layers=4, bits=BITS)
    searcher = PPO(problem, seed=0, evaluations=30, **QUICK)
    for count in (3, 0, 1):
        policies = searcher.propose()
        assert len(policies) == 8
        searcher.observe(policies[:count], [1.0, 2.0, 3.0][:count])
    assert all(problem.feasible(policy) for policy in searcher.propose())
    weights = jax.tree.leaves(searcher._agent.params)
    assert all(np.isfinite(x).all() for x in weights)


@pytest.mark.slow
def test_options_are_drawn_by_their_probabilities_and_others_have_none():
    problem = layered(layers=3, bits=(2, 8), budget=0.4)
    env, key = environment.build(problem), jax.random.key(0)
    agent = ppo.create(LEARNER, env, key)
    found = ppo.sample(LEARNER, agent.params, env, key, 500)
    log_probs, taken = LEARNER.taken(agent.params, found)
    np.testing.assert_allclose(found.log_probs, taken, atol=1e-5)
    assert not found.allowed.all()
    assert np.exp(log_probs)[~np.asarray(found.allowed)].max() == 0
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, rtol=1e-5)
    expected = np.exp(log_probs[0, 1, 1])  # of the first layer, the same for all
    assert abs(np.mean(found.options[:, 1] == 1) - expected) < 4 * 0.5 / np.sqrt(500)


@pytest.mark.slow
@pytest.mark.parametrize("imitate", [0.0, 100.0])
def test_what_was_rewarded_becomes_likelier_by_no_more_than_the_clip(imitate):
    problem = layered(layers=3, bits=(2, 8), budget=1.0)
    env, key = environment.build(problem), jax.random.key(2)
    learner = dataclasses.replace(LEARNER, imitate=imitate, epochs=300)
    agent = ppo.create(learner, env, key)
    found = ppo.sample(learner, agent.params, env, key, 64)
    eights = np.asarray(found.options == 1)[:, 1]
    rewards, mask = np.where(eights, 1.0, -1.0).astype(np.float32), np.ones(64, np.float32)
    # The last two rewards are not known, and wrong.
    rewards[-2:], mask[-2:] = 1e6, 0.0
    worst = jax.tree.map(lambda x: x[~eights][:1], found)
    before = np.exp(learner.taken(agent.params, found)[0][0, 1, 1])
    agent = ppo.learn(learner, agent, found, rewards, mask, worst, np.float32(0.0))
    log_probs, _ = learner.taken(agent.params, found)
    after = np.exp(log_probs[0, 1, 1])
    if imitate:
        assert after < 0.1 * before
    else:
        assert 1.1 * before < after < 1.35 * before


@pytest.mark.slow
def test_entropy_keeps_the_options_open():
    problem = layered(layers=3, bits=(2, 8), budget=1.0)
    env, key = environment.build(problem), jax.random.key(3)
    learner = dataclasses.replace(LEARNER, epochs=200, learning_rate=1e-2)
    agent = ppo.create(learner, env, key)
    agent = agent.replace(
        params=jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape), agent.params)
    )
    found = ppo.sample(learner, agent.params, env, key, 32)

    def spread(agent):
        log_probs, _ = learner.taken(agent.params, found)
        return float(-(jnp.exp(log_probs) * log_probs)[:, 1:].sum(-1).mean())

    before = spread(agent)
    given = np.zeros(32, np.float32), np.ones(32, np.float32), found
    agent = ppo.learn(learner, agent, found, *given, np.float32(10.0))
    assert before < 0.95 * np.log(2)
    assert spread(agent) > 0.99 * np.log(2)
