"""The updates of learning agents: the values that a critic learns, the options that are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import layered
from scipy import stats

from kdq.search import environment
from kdq.search.searchers import ddpg, ppo
from kdq.search.searchers.agents import rewards


def build(**sizes):
    """Returns the environment of a problem with options of 2 and 8 bits."""
    problem = layered(bits=(2, 8), **sizes)
    return problem, environment.build(problem)


def feedback(rewards, best, baseline, count, updates):
    return ddpg.Feedback(
        rewards=np.array(rewards, np.float32),
        best=np.array(best, np.int32),
        baseline=np.float32(baseline),
        count=count,
        updates=updates,
    )


def ddpg_settings(**changes):
    fields = {
        "hidden": (16,),
        "actor_learning_rate": 3e-3,
        "critic_learning_rate": 1e-2,
        "tau": 0.1,
        "batch_size": 32,
        "imitate": 0.0,
        "replay": 4,
    }
    return ddpg.Settings(**fields | changes)


def test_without_noise_actions_are_the_actors_own_and_those_stored_are_projected():
    problem, env = build(layers=4, budget=0.9)
    key, settings = jax.random.key(0), ddpg_settings(hidden=(8,))
    actor = ddpg.create(settings, env, key).params["actor"]
    noise = np.array([0.0] * 4 + [np.inf] * 200, np.float32)
    policies, observations, actions = ddpg.episodes(settings, actor, env, key, noise)
    assert len(set(map(tuple, np.asarray(policies[:4]).tolist()))) == 1
    for i in (0, 100):
        places = [d.places[o] for d, o in zip(problem.decisions, policies[i], strict=True)]
        np.testing.assert_allclose(actions[i], places)
    # Both options of the first layer are allowed: of uniform actions a half means each.
    share = np.mean(np.asarray(policies[4:, 1]) == 1)
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(200)
    action = ddpg.act(settings, actor, observations[0, 1])
    state = environment.step(env, environment.reset(env), jnp.int32(0))
    assert policies[0, 1] == environment.nearest(env, state, action)


def test_the_critic_learns_the_rewards_to_come():
    """γ is 1: a reward beyond the baseline, shared out, and the value of the next transition."""
    _, env = build(layers=2, budget=1.0)
    settings = ddpg_settings(hidden=(32,), actor_learning_rate=0.0)
    agent = ddpg.create(settings, env, jax.random.key(1))
    # One reward for each of the four policies; the last layer decides it.
    episode_rewards, baseline = [-1.0, 1.0, -1.0, 1.0], 0.75
    episodes = []
    for i, options in enumerate([(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]):
        state, seen, done = environment.reset(env), [], []
        for option in options:
            seen.append(environment.observe(env, state))
            state = environment.step(env, state, jnp.int32(option))
            done.append(state.action)
        episodes.append((jnp.stack(seen), jnp.stack(done)))
        known = feedback(episode_rewards, [0], baseline, i + 1, 3000 if i == 3 else 0)
        agent = ddpg.learn(settings, agent, episodes[-1], known, jax.random.key(2))
    value = lambda seen, done: ddpg.evaluate(settings, agent.params["critic"], seen, done)
    then = lambda seen: value(seen, ddpg.act(settings, agent.params["actor"], seen))
    for (seen, done), reward in zip(episodes, episode_rewards, strict=True):
        values = value(seen, done)
        np.testing.assert_allclose(values[2], (reward - baseline) / 3, atol=0.1)
        # Of each first layer's two episodes the rewards cancel, and so of all four.
        np.testing.assert_allclose(values[1], -baseline / 3 + then(seen)[2], atol=0.1)
    first = np.mean([value(*episode)[0] for episode in episodes])
    second = np.mean([then(seen)[1] for seen, _ in episodes])
    np.testing.assert_allclose(first, -baseline / 3 + second, atol=0.1)


@pytest.mark.parametrize(("imitate", "good"), [(0.0, 1), (1e4, 0)])
def test_the_actor_climbs_the_value_or_follows_the_best(imitate, good):
    """One decision of two options, good and bad: the actor moves to the good one's place."""
    _, env = build(layers=1, budget=1.0)
    key, settings = jax.random.key(0), ddpg_settings(imitate=imitate, replay=2)
    first = environment.observe(env, environment.reset(env))
    state = environment.step(env, environment.reset(env), jnp.int32(0))
    observation = environment.observe(env, state)
    agent = ddpg.create(settings, env, key)
    for i, updates in enumerate((0, 400)):
        episode = jnp.stack([first, observation]), jnp.array([[0.0, 0.0], [float(i), 1.0]])
        known = feedback([-1.0, 1.0], [0], 0.0, i + 1, updates)  # of 2 bits, of 8
        agent = ddpg.learn(settings, agent, episode, known, key)
    assert abs(ddpg.act(settings, agent.params["actor"], observation)[0] - good) < 0.2


def test_rewards_are_normal_quantiles_of_ranks():
    scores = [3.0, 1e9, -5.0, 3.0, np.nan, np.inf]
    # How many are worse, and half of those that are equal, itself included.
    shares = np.array([3 + 1, 2 + 0.5, 5 + 0.5, 3 + 1, 0 + 1, 0 + 1]) / 6
    np.testing.assert_allclose(rewards(scores, 8), [*stats.norm.ppf(shares), 0, 0], rtol=1e-5)
    np.testing.assert_array_equal(rewards(scores, 6), rewards([1e3 * s for s in scores], 6))


def ppo_settings(**changes):
    fields = {"hidden": (16,), "learning_rate": 1e-3, "epochs": 5, "imitate": 0.0}
    return ppo.Settings(**fields | changes)


def test_options_are_drawn_by_their_probabilities_and_others_have_none():
    _, env = build(layers=3, budget=0.4)
    key, settings = jax.random.key(0), ppo_settings()
    params = ppo.create(settings, env, key).params
    episodes = ppo.sample(settings, params, env, key, 500)
    log_probs, taken = ppo.taken(settings, params, episodes)
    np.testing.assert_allclose(episodes.log_probs, taken, atol=1e-5)
    assert not episodes.allowed.all()
    assert np.exp(log_probs)[~np.asarray(episodes.allowed)].max() == 0
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, rtol=1e-5)
    expected = np.exp(log_probs[0, 1, 1])  # of the first layer, the same for all
    assert abs(np.mean(episodes.options[:, 1] == 1) - expected) < 4 * 0.5 / np.sqrt(500)


@pytest.mark.parametrize("imitate", [0.0, 100.0])
def test_what_was_rewarded_becomes_likelier_by_no_more_than_the_clip(imitate):
    _, env = build(layers=3, budget=1.0)
    key, settings = jax.random.key(2), ppo_settings(imitate=imitate, epochs=300)
    agent = ppo.create(settings, env, key)
    episodes = ppo.sample(settings, agent.params, env, key, 64)
    eights = np.asarray(episodes.options == 1)[:, 1]
    rewards, mask = np.where(eights, 1.0, -1.0).astype(np.float32), np.ones(64, np.float32)
    # The last two rewards are not known, and wrong.
    rewards[-2:], mask[-2:] = 1e6, 0.0
    worst = jax.tree.map(lambda x: x[~eights][:1], episodes)
    before = np.exp(ppo.taken(settings, agent.params, episodes)[0][0, 1, 1])
    agent = ppo.learn(settings, agent, episodes, rewards, mask, worst, np.float32(0.0))
    after = np.exp(ppo.taken(settings, agent.params, episodes)[0][0, 1, 1])
    if imitate:
        assert after < 0.1 * before
    else:
        assert 1.1 * before < after < 1.35 * before


def test_entropy_keeps_the_options_open():
    _, env = build(layers=3, budget=1.0)
    key, settings = jax.random.key(3), ppo_settings(epochs=200, learning_rate=1e-2)
    agent = ppo.create(settings, env, key)
    agent = agent.replace(
        params=jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape), agent.params)
    )
    episodes = ppo.sample(settings, agent.params, env, key, 32)

    def spread(agent):
        log_probs, _ = ppo.taken(settings, agent.params, episodes)
        return float(-(jnp.exp(log_probs) * log_probs)[:, 1:].sum(-1).mean())

    before = spread(agent)
    rewards, mask = np.zeros(32, np.float32), np.ones(32, np.float32)
    agent = ppo.learn(settings, agent, episodes, rewards, mask, episodes, np.float32(10.0))
    assert before < 0.95 * np.log(2)
    assert spread(agent) > 0.99 * np.log(2)
