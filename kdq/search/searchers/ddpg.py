"""Deep deterministic policy gradients over a policy's decisions, after HAQ (arXiv:1811.08886)."""

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
    actor_learning_rate: float
    critic_learning_rate: float
    tau: float
    batch_size: int
    imitate: float

    def act(self, params: Any, observation: Array) -> Array:
        """[..., observation] to the action, [..., 2] in (0, 1)."""
        return jax.nn.sigmoid(MLP(self.hidden, 2).apply(params, observation))

    def value(self, params: Any, observation: Array, action: Array) -> Array:
        """[..., observation] and [..., 2] to the rewards to come, [...]."""
        inputs = jnp.concatenate([observation, action], -1)
        return MLP(self.hidden, 1).apply(params, inputs)[..., 0]


@struct.dataclass
class Agent:
    """All that learns, and the replay buffer."""

    actor: Any
    critic: Any
    target_actor: Any
    target_critic: Any
    actor_state: optax.OptState
    critic_state: optax.OptState
    observations: Array  # [replay, decisions, observation] float32
    actions: Array  # [replay, decisions, 2] float32: the projected ones


def create(learner: Learner, env: Environment, replay: int, key: Array) -> Agent:
    observation = environment.observe(env, environment.reset(env))
    one, other = jax.random.split(key)
    actor = MLP(learner.hidden, 2).init(one, observation)
    critic = MLP(learner.hidden, 1).init(other, jnp.append(observation, jnp.zeros(2)))
    return Agent(
        actor=actor,
        critic=critic,
        target_actor=jax.tree.map(jnp.copy, actor),  # both are donated
        target_critic=jax.tree.map(jnp.copy, critic),
        actor_state=optax.adam(learner.actor_learning_rate).init(actor),
        critic_state=optax.adam(learner.critic_learning_rate).init(critic),
        observations=jnp.zeros((replay, env.decisions, observation.size)),
        actions=jnp.zeros((replay, env.decisions, 2)),
    )


def episode(
    learner: Learner, actor: Any, env: Environment, key: Array, noise: Array
) -> tuple[Array, Array, Array]:
    """One policy.

    Args:
      learner: static.
      actor: its params.
      env: what is searched.
      key: of the noise.
      noise: the standard deviation of a normal distribution around the actor's action, truncated
        to where actions are; infinite for a uniform one.

    Returns:
      The policy [decisions] int32, observations [decisions, observation], and projected actions
      [decisions, 2].
    """

    noise = jnp.float32(noise)

    def decide(state: State, key: Array) -> tuple[State, tuple[Array, Array, Array]]:
        observation = environment.observe(env, state)
        mean = learner.act(actor, observation)
        sigma = jnp.clip(noise, 1e-3, 1e3)
        drawn = jax.random.truncated_normal(key, -mean / sigma, (1 - mean) / sigma, (2,))
        action = jnp.where(noise > 0, jnp.clip(mean + sigma * drawn, 0, 1), mean)
        option = environment.nearest(env, state, action)
        state = environment.step(env, state, option)
        return state, (option, observation, state.action)

    keys = jax.random.split(key, env.decisions)
    return jax.lax.scan(decide, environment.reset(env), keys)[1]


episodes = jax.jit(jax.vmap(episode, (None, None, None, 0, 0)), static_argnums=0)


@partial(jax.jit, static_argnames="learner", donate_argnames="agent")
def learn(
    learner: Learner,
    agent: Agent,
    observations: Array,
    actions: Array,
    rewards: Array,
    count: Array,
    baseline: Array,
    updates: Array,
    best: Array,
    key: Array,
) -> Agent:
    """Stores an episode, and trains actor and critic on transitions of the buffer.

    Args:
      learner: static.
      agent: donated.
      observations: [decisions, observation] of the episode.
      actions: [decisions, 2].
      rewards: [replay] of each episode in the buffer, in order of their slots.
      count: how many episodes there have been, this one included.
      baseline: what is taken from each reward.
      updates: how many.
      key: of the batches.
    """
    replay, decisions = agent.actions.shape[:2]
    slot = (count - 1) % replay
    agent = agent.replace(
        observations=agent.observations.at[slot].set(observations),
        actions=agent.actions.at[slot].set(actions),
    )

    def update(i: Array, agent: Agent) -> Agent:
        one, other = jax.random.split(jax.random.fold_in(key, i))
        shape = (learner.batch_size,)
        which = jax.random.randint(one, shape, 0, jnp.minimum(count, replay))
        when = jax.random.randint(other, shape, 0, decisions)
        later = jnp.minimum(when + 1, decisions - 1)
        now, then = agent.observations[which, when], agent.observations[which, later]
        action = agent.actions[which, when]
        value = learner.value(agent.target_critic, then, learner.act(agent.target_actor, then))
        target = (rewards[which] - baseline) / decisions
        target += jnp.where(when < decisions - 1, value, 0.0)
        good = best[jax.random.randint(jax.random.fold_in(one, 1), shape, 0, best.size)]
        goods = agent.observations[good, when], agent.actions[good, when]
        return _descend(learner, agent, now, action, target, *goods)

    return jax.lax.fori_loop(0, updates, update, agent)


def _descend(
    learner: Learner, agent: Agent, observation: Array, action: Array, target: Array, good, good_action
) -> Agent:
    """A step of the critic, then one of the actor; the targets follow."""

    def critic_loss(params: Any) -> Array:
        return jnp.square(learner.value(params, observation, action) - target).mean()

    grads = jax.grad(critic_loss)(agent.critic)
    optimizer = optax.adam(learner.critic_learning_rate)
    updates, critic_state = optimizer.update(grads, agent.critic_state)
    critic = optax.apply_updates(agent.critic, updates)

    def actor_loss(params: Any) -> Array:
        q = learner.value(critic, observation, learner.act(params, observation))
        away = jnp.square(learner.act(params, good) - good_action).sum(-1).mean()
        return learner.imitate * away - q.mean() * agent.actions.shape[1]

    grads = jax.grad(actor_loss)(agent.actor)
    optimizer = optax.adam(learner.actor_learning_rate)
    updates, actor_state = optimizer.update(grads, agent.actor_state)
    actor = optax.apply_updates(agent.actor, updates)
    return agent.replace(
        actor=actor,
        critic=critic,
        target_actor=optax.incremental_update(actor, agent.target_actor, learner.tau),
        target_critic=optax.incremental_update(critic, agent.target_critic, learner.tau),
        actor_state=actor_state,
        critic_state=critic_state,
    )


class DDPG:
    """One episode a proposal: an actor that acts with noise, and a critic that learns its value.

    As in HAQ the reward of the whole policy is given to each of its transitions, less an average of
    the last ones, γ is 1, and the noise is normal, truncated to where actions are. Of our own:
    rewards are ranks (see `rewards`), shared out over the decisions; the networks are normalized.

    Args:
      problem: with sensitivities, which the agent observes.
      seed: of networks, noise and batches.
      evaluations: how many policies in all; in the last tenth the agent acts without noise.
      hidden: widths of both networks.
      actor_learning_rate: of Adam.
      critic_learning_rate: of Adam.
      tau: the share by which the target networks follow at each update.
      batch_size: transitions an update.
      updates: after each episode.
      replay: episodes that the buffer holds.
      warmup: share of the evaluations with random actions, before anything is learned.
      noise: standard deviation after the warm-up.
      least_noise: and at the last tenth; it falls exponentially.
    """

    needs: ClassVar[tuple[str, ...]] = ("sensitivity",)

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int,
        evaluations: int,
        hidden: Sequence[int] = (32, 32),
        actor_learning_rate: float = 1e-3,
        critic_learning_rate: float = 1e-3,
        tau: float = 0.05,
        batch_size: int = 64,
        updates: int = 25,
        replay: int = 1000,
        warmup: float = 0.1,
        noise: float = 0.3,
        least_noise: float = 0.05,
        draws: int = 8,
        imitate: float = 30.0,
        elite: int = 8,
    ):
        self._problem, self._evaluations = problem, evaluations
        self._learner = Learner(
            hidden=tuple(hidden),
            actor_learning_rate=actor_learning_rate,
            critic_learning_rate=critic_learning_rate,
            tau=tau,
            batch_size=batch_size,
            imitate=imitate,
        )
        self._env = environment.build(problem)
        self._key = jax.random.key(seed)
        self._replay = min(replay, evaluations)
        self._agent = create(self._learner, self._env, self._replay, self._key)
        self._updates = updates
        self._warmup, self._last = round(warmup * evaluations), round(0.9 * evaluations)
        self._noise, self._least_noise = noise, least_noise
        self._proposed = 0
        self._scores: list[float] = []
        self._pending = None
        self._seen = set()
        self._draws = draws
        self._elite = elite

    def propose(self) -> list[Policy]:
        if self._proposed >= self._evaluations:
            return []
        key = jax.random.fold_in(self._key, 2 * self._proposed)
        noise = np.concatenate([[self._sigma(self._proposed)], np.maximum(self._sigma(self._proposed), 0.02) * 1.15**np.arange(self._draws - 1)]).astype(np.float32)
        keys = jax.random.split(key, len(noise))
        policies, *transitions = jax.device_get(episodes(self._learner, self._agent.actor, self._env, keys, noise))
        self._proposed += 1
        policies = environment.checked(self._problem, policies)
        i = next((i for i, p in enumerate(policies) if p not in self._seen), 0)
        self._seen.add(policies[i])
        self._pending = [x[i] for x in transitions]
        return [policies[i]]

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        if not scores:
            return
        self._scores.extend(scores)
        count = len(self._scores)
        kept = np.arange(max(0, count - self._replay), count)
        ranked = rewards(np.asarray(self._scores)[kept], len(kept))
        age = 0.95 ** np.arange(len(kept))[::-1]
        slots = np.zeros(self._replay, np.float32)
        slots[kept % self._replay] = ranked
        self._agent = learn(
            self._learner,
            self._agent,
            *self._pending,
            slots,
            count,
            np.float32(np.average(ranked, weights=age)),
            self._updates if count >= self._warmup else 0,
            np.resize(np.argsort(-ranked, kind="stable")[:self._elite], self._elite),
            jax.random.fold_in(self._key, 2 * self._proposed - 1),
        )

    def _sigma(self, proposed: int) -> float:
        """The noise of an episode."""
        if proposed < self._warmup:
            return np.inf
        if proposed >= self._last:
            return 0.0
        through = (proposed - self._warmup) / max(self._last - self._warmup, 1)
        return self._noise * (self._least_noise / self._noise) ** through
