"""Proximal policy optimization over a policy's options (arXiv:1707.06347)."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from kdq.search import environment
from kdq.search.environment import Environment, State
from kdq.search.problem import Policy, Problem
from kdq.search.searchers import agents
from kdq.search.searchers.agents import MLP, Learner, descend, rewards
from kdq.types import Array

# How many times as many episodes are sampled as policies proposed; and how often that is tried
# again with nothing new among them, before a policy that has a score is proposed again.
DRAWS, TRIES = 4, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of PPO; static, so that agents with equal ones share what is compiled."""

    episodes: int = 8  # a proposal, at most
    hidden: tuple[int, ...] = (64, 64)  # widths of both networks
    learning_rate: float = 3e-3  # of Adam
    clip: float = 0.2  # how far the ratio of probabilities may go from 1
    epochs: int = 20  # over each proposal's episodes
    entropy: float = 0.2  # weight of the entropy at first; it falls linearly to 0
    imitate: float = 0.3  # weight of the log-probability of the best episodes' options
    elite: int = 12  # how many episodes are the best


@struct.dataclass
class Agent:
    """All that learns."""

    params: Any  # {"actor", "critic"}
    state: optax.OptState


@struct.dataclass
class Episodes:
    """Observations and decisions, with the axes [episodes, decisions]."""

    options: Array  # int32
    observations: Array  # and [observation] float32
    allowed: Array  # and [options] bool
    log_probs: Array  # float32, of the option that was taken, when it was


def log_probabilities(settings: Settings, params: Any, observation: Array, allowed: Array) -> Array:
    """Returns those of the options, [..., options]; -1e9 of those that are not allowed."""
    logits = MLP(settings.hidden, allowed.shape[-1]).apply(params["actor"], observation)
    return jax.nn.log_softmax(jnp.where(allowed, logits, -1e9))


def taken(settings: Settings, params: Any, episodes: Episodes) -> tuple[Array, Array]:
    """Returns log-probabilities of all options and of those taken: [..., options] and [...]."""
    every = log_probabilities(settings, params, episodes.observations, episodes.allowed)
    return every, jnp.take_along_axis(every, episodes.options[..., None], -1)[..., 0]


def create(settings: Settings, env: Environment, key: Array) -> Agent:
    """Returns a new agent."""
    networks = MLP(settings.hidden, env.options), MLP(settings.hidden, 1)
    params = agents.init(*networks, env, key)
    return Agent(params=params, state=optax.adam(settings.learning_rate).init(params))


@partial(jax.jit, static_argnames=("settings", "count"))
def sample(settings: Settings, params: Any, env: Environment, key: Array, count: int) -> Episodes:
    """Returns `count` episodes, each option drawn by its probability."""

    def decide(key: Array, state: State, observation: Array) -> tuple[Array, tuple[Array, Array]]:
        allowed = environment.allowed(env, state)
        log_probs = log_probabilities(settings, params, observation, allowed)
        option = jax.random.categorical(key, log_probs).astype(jnp.int32)
        return option, (allowed, log_probs[option])

    keys = jax.random.split(key, count)
    options, observations, _, kept = jax.vmap(partial(agents.episode, env, decide))(keys)
    return Episodes(options, observations, *kept)


@partial(jax.jit, static_argnames="settings", donate_argnames="agent")
def learn(
    settings: Settings,
    agent: Agent,
    episodes: Episodes,
    rewards: Array,  # [episodes], at the end of each; with γ of 1 the return of each decision
    mask: Array,  # [episodes], 0 of those without a reward
    best: Episodes,  # which the policy imitates
    entropy: Array,  # weight of the policy's entropy
) -> Agent:
    """Trains for a few epochs over the last episodes."""

    def value(params: Any) -> Array:
        """The reward to come, [episodes, decisions]."""
        return MLP(settings.hidden, 1).apply(params["critic"], episodes.observations)[..., 0]

    weight = jnp.broadcast_to(mask[:, None], episodes.options.shape)
    weight = weight / weight.sum()
    returns = jnp.broadcast_to(rewards[:, None], episodes.options.shape)
    # Advantages have mean 0 and standard deviation 1 over the episodes with a reward.
    advantage = returns - value(agent.params)
    advantage -= (weight * advantage).sum()
    advantage /= jnp.sqrt((weight * jnp.square(advantage)).sum()) + 1e-6

    def loss(params: Any) -> Array:
        # The clipped surrogate, equation 7 of the paper, and its terms of equation 9.
        log_probs, log_prob = taken(settings, params, episodes)
        ratio = jnp.exp(log_prob - episodes.log_probs)
        clipped = jnp.clip(ratio, 1 - settings.clip, 1 + settings.clip)
        surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
        spread = -(jnp.exp(log_probs) * log_probs).sum(-1)
        error = jnp.square(value(params) - returns)
        total = (weight * (0.5 * error - surrogate - entropy * spread)).sum()
        return total - settings.imitate * taken(settings, params, best)[1].mean()

    def epoch(_: int, agent: Agent) -> Agent:
        return Agent(*descend(loss, agent.params, agent.state, settings.learning_rate))

    return jax.lax.fori_loop(0, settings.epochs, epoch, agent)


class PPO(Learner):
    """Several episodes a proposal, of a policy that draws each decision's option.

    The clipped surrogate, with an entropy bonus that falls to nothing; options that would break a
    budget have no probability; rewards are ranks (see `rewards`). As in self-imitation learning
    (arXiv:1806.05635) the policy is also drawn to the best episodes so far. Episodes of policies
    whose scores are known already are learned from too, and cost no evaluation.
    """

    Settings = Settings

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Settings):
        super().__init__(problem, seed=seed, evaluations=evaluations, settings=settings)
        self._agent = create(settings, self._env, self._key)
        self._proposed, self._sampled = 0, 0
        self._scores: dict[Policy, float] = {}
        self._episode: dict[Policy, Episodes] = {}  # of each policy with a score
        self._drawn: tuple[list[Policy], Episodes]  # last

    def propose(self) -> list[Policy]:
        count = min(self._settings.episodes, self._evaluations - self._proposed)
        if count <= 0:
            return []
        for _ in range(TRIES):
            key = jax.random.fold_in(self._key, self._sampled)
            drawn = DRAWS * self._settings.episodes
            episodes = sample(self._settings, self._agent.params, self._env, key, drawn)
            episodes = jax.device_get(episodes)
            policies = [self._problem.projected(policy) for policy in episodes.options]
            self._sampled += 1
            self._drawn = policies, episodes
            new = [p for p in dict.fromkeys(policies) if p not in self._scores][:count]
            if new:
                break
            self._learn()
        new = new or policies[:count]
        self._proposed += len(new)
        return new

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        if not scores:
            return
        drawn, episodes = self._drawn
        for policy, score in zip(policies, scores, strict=True):
            place = drawn.index(policy)
            self._scores[policy] = score
            self._episode[policy] = jax.tree.map(lambda x, i=place: x[i], episodes)
        self._learn()

    def _learn(self) -> None:
        """Learns from the drawn policies that have a score."""
        drawn, episodes = self._drawn
        known = list(self._scores)
        ranked = dict(zip(known, rewards(list(self._scores.values()), len(known)), strict=True))
        elite = self._settings.elite
        best = sorted(known, key=lambda policy: -ranked[policy])[:elite]
        best = [best[i % len(best)] for i in range(elite)]  # repeated, if there are fewer
        self._agent = learn(
            self._settings,
            self._agent,
            episodes,
            np.array([ranked.get(policy, 0.0) for policy in drawn], np.float32),
            np.array([policy in ranked for policy in drawn], np.float32),
            jax.tree.map(lambda *x: np.stack(x), *[self._episode[policy] for policy in best]),
            np.float32(self._settings.entropy * (1 - self._proposed / self._evaluations)),
        )
