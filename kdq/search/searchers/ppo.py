"""Proximal policy optimization over a policy's options (arXiv:1707.06347)."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from kdq.search import environment
from kdq.search.environment import Environment, State
from kdq.search.problem import Policy, Problem
from kdq.search.searchers.networks import MLP, rewards
from kdq.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """How the agent learns; static, so that agents alike share what is compiled."""

    hidden: tuple[int, ...]
    options: int
    learning_rate: float
    clip: float
    epochs: int

    def logits(self, params: Any, observation: Array, allowed: Array) -> Array:
        """Log-probabilities of the options, [..., options]; of those that are not allowed -1e9."""
        logits = MLP(self.hidden, self.options).apply(params["actor"], observation)
        return jax.nn.log_softmax(jnp.where(allowed, logits, -1e9))

    def value(self, params: Any, observation: Array) -> Array:
        """The reward to come, [...]."""
        return MLP(self.hidden, 1).apply(params["critic"], observation)[..., 0]


@struct.dataclass
class Agent:
    """All that learns."""

    params: Any  # {"actor", "critic"}
    state: optax.OptState


@struct.dataclass
class Episodes:
    """What was seen and done, with the axes [episodes, decisions]."""

    options: Array  # int32
    observations: Array  # and [observation] float32
    allowed: Array  # and [options] bool
    log_probs: Array  # float32, of the option that was taken, when it was


def create(learner: Learner, env: Environment, key: Array) -> Agent:
    observation = environment.observe(env, environment.reset(env))
    one, other = jax.random.split(key)
    params = {
        "actor": MLP(learner.hidden, learner.options).init(one, observation),
        "critic": MLP(learner.hidden, 1).init(other, observation),
    }
    return Agent(params=params, state=optax.adam(learner.learning_rate).init(params))


@partial(jax.jit, static_argnames=("learner", "count"))
def sample(learner: Learner, params: Any, env: Environment, key: Array, count: int) -> Episodes:
    """`count` episodes, each option drawn by its probability."""

    def decide(state: State, key: Array) -> tuple[State, Episodes]:
        observation = environment.observe(env, state)
        allowed = environment.allowed(env, state)
        log_probs = learner.logits(params, observation, allowed)
        option = jax.random.categorical(key, log_probs).astype(jnp.int32)
        taken = Episodes(option, observation, allowed, log_probs[option])
        return environment.step(env, state, option), taken

    def one(key: Array) -> Episodes:
        keys = jax.random.split(key, env.decisions)
        return jax.lax.scan(decide, environment.reset(env), keys)[1]

    return jax.vmap(one)(jax.random.split(key, count))


@partial(jax.jit, static_argnames="learner", donate_argnames="agent")
def learn(
    learner: Learner,
    agent: Agent,
    episodes: Episodes,
    rewards: Array,
    mask: Array,
    entropy: Array,
    best: Episodes,
    imitate: Array,
) -> Agent:
    """A few epochs over the last episodes.

    Args:
      learner: static.
      agent: donated.
      episodes: as sampled.
      rewards: [episodes], at the end of each; with γ of 1 the return of each of its decisions.
      mask: [episodes], 0 of those without a reward.
      entropy: the weight of the policy's entropy.
    """
    weight = jnp.broadcast_to(mask[:, None], episodes.options.shape)
    weight = weight / weight.sum()
    returns = jnp.broadcast_to(rewards[:, None], episodes.options.shape)
    advantage = returns - learner.value(agent.params, episodes.observations)
    advantage -= (weight * advantage).sum()
    advantage /= jnp.sqrt((weight * jnp.square(advantage)).sum()) + 1e-6

    def loss(params: Any) -> Array:
        log_probs = learner.logits(params, episodes.observations, episodes.allowed)
        taken = jnp.take_along_axis(log_probs, episodes.options[..., None], -1)[..., 0]
        ratio = jnp.exp(taken - episodes.log_probs)
        clipped = jnp.clip(ratio, 1 - learner.clip, 1 + learner.clip)
        surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
        spread = -(jnp.exp(log_probs) * log_probs).sum(-1)
        good = learner.logits(params, best.observations, best.allowed)
        good = jnp.take_along_axis(good, best.options[..., None], -1)[..., 0].mean(-1)
        surrogate = surrogate + (imitate * good).sum()
        error = jnp.square(learner.value(params, episodes.observations) - returns)
        return (weight * (0.5 * error - surrogate - entropy * spread)).sum()

    def epoch(_: int, agent: Agent) -> Agent:
        grads = jax.grad(loss)(agent.params)
        updates, state = optax.adam(learner.learning_rate).update(grads, agent.state)
        return Agent(params=optax.apply_updates(agent.params, updates), state=state)

    return jax.lax.fori_loop(0, learner.epochs, epoch, agent)


class PPO:
    """Several episodes a proposal, of a policy that draws each decision's option.

    The clipped surrogate with an entropy bonus that falls to nothing. Options that would break a
    budget have no probability. Rewards are ranks (see `rewards`).

    Args:
      problem: with sensitivities, which the agent observes.
      seed: of networks and draws.
      evaluations: how many policies in all.
      episodes: a proposal.
      hidden: widths of both networks.
      learning_rate: of Adam.
      clip: how far the ratio of probabilities may go from 1.
      epochs: over each proposal's episodes.
      entropy: weight of the entropy at first; it falls linearly to 0.
    """

    needs: ClassVar[tuple[str, ...]] = ("sensitivity",)

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int,
        evaluations: int,
        episodes: int = 8,
        hidden: Sequence[int] = (64, 64),
        learning_rate: float = 3e-3,
        clip: float = 0.2,
        epochs: int = 10,
        entropy: float = 0.02,
        imitate: float = 1.0,
        elite: int = 8,
        draws: int = 4,
        tries: int = 8,
    ):
        self._problem, self._evaluations, self._episodes = problem, evaluations, episodes
        self._env = environment.build(problem)
        self._learner = Learner(
            hidden=tuple(hidden),
            options=self._env.options,
            learning_rate=learning_rate,
            clip=clip,
            epochs=epochs,
        )
        self._key = jax.random.key(seed)
        self._agent = create(self._learner, self._env, self._key)
        self._entropy, self._imitate, self._elite = entropy, imitate, elite
        self._draws, self._tries = draws * episodes, tries
        self._proposed = 0
        self._steps = 0
        self._known: dict = {}
        self._kept: dict = {}
        self._pending = []

    def propose(self) -> list[Policy]:
        count = min(self._episodes, self._evaluations - self._proposed)
        if count <= 0:
            return []
        new = []
        for _ in range(self._tries):
            self._steps += 1
            key = jax.random.fold_in(self._key, self._steps)
            params = self._agent.params
            drawn = jax.device_get(sample(self._learner, params, self._env, key, self._draws))
            policies = environment.checked(self._problem, drawn.options)
            new = [p for p in dict.fromkeys(policies) if p not in self._known][:count]
            for i, p in enumerate(policies):
                if p not in self._kept:
                    self._kept[p] = jax.tree.map(lambda x: x[i], drawn)
            self._pending = (policies, drawn)
            if new:
                break
            self._learn()
        if not new:
            new = policies[:count]
        self._proposed += len(new)
        return new

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        self._known.update(zip(policies, scores, strict=True))
        self._kept = {p: v for p, v in self._kept.items() if p in self._known}
        self._learn()

    def _learn(self):
        drawn, episodes = self._pending
        names = list(self._known)
        ranked = dict(zip(names, rewards(list(self._known.values()), len(names))))
        mask = np.array([p in ranked for p in drawn], np.float32)
        if not mask.any():
            return
        padded = np.array([ranked.get(p, 0.0) for p in drawn], np.float32)
        best = sorted(names, key=lambda p: -ranked[p])[: self._elite]
        best = [best[i % len(best)] for i in range(self._elite)]
        best = jax.tree.map(lambda *x: np.stack(x), *[self._kept[p] for p in best])
        w = np.full(self._elite, self._imitate / self._elite, np.float32)
        self._agent = learn(
            self._learner,
            self._agent,
            episodes,
            padded,
            mask,
            np.float32(self._entropy * (1 - self._proposed / self._evaluations)),
            best,
            w,
        )
