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

# Of what is sampled at once, as a multiple of what is proposed; and how often that is tried again
# with nothing new in it, before what has a score already is proposed again.
DRAWS, TRIES = 4, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """How the agent learns; static, so that agents alike share what is compiled."""

    hidden: tuple[int, ...]
    options: int
    learning_rate: float
    clip: float
    epochs: int
    imitate: float

    def logits(self, params: Any, observation: Array, allowed: Array) -> Array:
        """Log-probabilities of the options, [..., options]; of those that are not allowed -1e9."""
        logits = MLP(self.hidden, self.options).apply(params["actor"], observation)
        return jax.nn.log_softmax(jnp.where(allowed, logits, -1e9))

    def taken(self, params: Any, episodes: "Episodes") -> tuple[Array, Array]:
        """Log-probabilities of all options and of those taken, [episodes, decisions, (options)]."""
        logits = self.logits(params, episodes.observations, episodes.allowed)
        return logits, jnp.take_along_axis(logits, episodes.options[..., None], -1)[..., 0]

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
    best: Episodes,
    entropy: Array,
) -> Agent:
    """A few epochs over the last episodes.

    Args:
      learner: static.
      agent: donated.
      episodes: as sampled.
      rewards: [episodes], at the end of each; with γ of 1 the return of each of its decisions.
      mask: [episodes], 0 of those without a reward.
      best: the best episodes there were, which the policy imitates.
      entropy: the weight of the policy's entropy.
    """
    weight = jnp.broadcast_to(mask[:, None], episodes.options.shape)
    weight = weight / weight.sum()
    returns = jnp.broadcast_to(rewards[:, None], episodes.options.shape)
    advantage = returns - learner.value(agent.params, episodes.observations)
    advantage -= (weight * advantage).sum()
    advantage /= jnp.sqrt((weight * jnp.square(advantage)).sum()) + 1e-6

    def loss(params: Any) -> Array:
        log_probs, taken = learner.taken(params, episodes)
        ratio = jnp.exp(taken - episodes.log_probs)
        clipped = jnp.clip(ratio, 1 - learner.clip, 1 + learner.clip)
        surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
        spread = -(jnp.exp(log_probs) * log_probs).sum(-1)
        error = jnp.square(learner.value(params, episodes.observations) - returns)
        own = (weight * (0.5 * error - surrogate - entropy * spread)).sum()
        return own - learner.imitate * learner.taken(params, best)[1].mean()

    def epoch(_: int, agent: Agent) -> Agent:
        grads = jax.grad(loss)(agent.params)
        updates, state = optax.adam(learner.learning_rate).update(grads, agent.state)
        return Agent(params=optax.apply_updates(agent.params, updates), state=state)

    return jax.lax.fori_loop(0, learner.epochs, epoch, agent)


class PPO:
    """Several episodes a proposal, of a policy that draws each decision's option.

    The clipped surrogate, with an entropy bonus that falls to nothing; options that would break a
    budget have no probability; rewards are ranks (see `rewards`). As in self-imitation learning
    (arXiv:1806.05635) the policy is also drawn to the best episodes there were. Episodes of
    policies whose scores are known already are learned from too, and cost no evaluation.

    Args:
      problem: with sensitivities, which the agent observes; zeros without.
      seed: of networks and draws.
      evaluations: how many policies in all.
      episodes: a proposal, at most.
      hidden: widths of both networks.
      learning_rate: of Adam.
      clip: how far the ratio of probabilities may go from 1.
      epochs: over each proposal's episodes.
      entropy: weight of the entropy at first; it falls linearly to 0.
      imitate: weight of the log-probability of the best episodes' options.
      elite: how many are the best.
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
        epochs: int = 20,
        entropy: float = 0.2,
        imitate: float = 0.3,
        elite: int = 12,
    ):
        self._problem, self._evaluations, self._episodes = problem, evaluations, episodes
        self._env = environment.build(problem)
        self._learner = Learner(
            hidden=tuple(hidden),
            options=self._env.options,
            learning_rate=learning_rate,
            clip=clip,
            epochs=epochs,
            imitate=imitate,
        )
        self._key = jax.random.key(seed)
        self._agent = create(self._learner, self._env, self._key)
        self._entropy, self._elite = entropy, elite
        self._proposed, self._sampled = 0, 0
        self._scores: dict[Policy, float] = {}
        self._episode: dict[Policy, Episodes] = {}  # of each policy with a score
        self._drawn: tuple[list[Policy], Episodes] | None = None  # last

    def propose(self) -> list[Policy]:
        count = min(self._episodes, self._evaluations - self._proposed)
        if count <= 0:
            return []
        for _ in range(TRIES):
            policies = self._sample()
            new = [one for one in dict.fromkeys(policies) if one not in self._scores][:count]
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

    def _sample(self) -> list[Policy]:
        """Policies by the agent as it is."""
        key = jax.random.fold_in(self._key, self._sampled)
        count = DRAWS * self._episodes
        drawn = jax.device_get(sample(self._learner, self._agent.params, self._env, key, count))
        policies = environment.checked(self._problem, drawn.options)
        self._sampled += 1
        self._drawn = policies, drawn
        return policies

    def _learn(self) -> None:
        """From those of the drawn policies that have a score."""
        drawn, episodes = self._drawn
        known = list(self._scores)
        ranked = dict(zip(known, rewards(list(self._scores.values()), len(known)), strict=True))
        best = sorted(known, key=lambda one: -ranked[one])[: self._elite]
        best = [best[i % len(best)] for i in range(self._elite)]  # repeated, if there are fewer
        self._agent = learn(
            self._learner,
            self._agent,
            episodes,
            np.array([ranked.get(one, 0.0) for one in drawn], np.float32),
            np.array([one in ranked for one in drawn], np.float32),
            jax.tree.map(lambda *x: np.stack(x), *[self._episode[one] for one in best]),
            np.float32(self._entropy * (1 - self._proposed / self._evaluations)),
        )
