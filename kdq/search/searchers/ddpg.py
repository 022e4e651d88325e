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

# What is drawn for one proposal: the first with the noise that is due, and others, should that have
# been proposed before, with more of it: at least this, each by this factor.
DRAWS, LEAST, MORE = 8, 0.02, 1.15


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


@partial(jax.jit, static_argnames="learner")
def episodes(
    learner: Learner, actor: Any, env: Environment, key: Array, noise: Array
) -> tuple[Array, Array, Array]:
    """Policies, each with a noise of its own.

    Args:
      learner: static.
      actor: its params.
      env: what is searched.
      key: of the noise.
      noise: [episodes], standard deviations of normal distributions around the actor's actions,
        truncated to where actions are; infinite for uniform ones, 0 for none.

    Returns:
      Policies [episodes, decisions] int32, observations [episodes, decisions, observation], and
      projected actions [episodes, decisions, 2].
    """

    def one(key: Array, noise: Array) -> tuple[Array, Array, Array]:
        sigma = jnp.clip(noise, 1e-3, 1e3)

        def decide(state: State, key: Array) -> tuple[State, tuple[Array, Array, Array]]:
            observation = environment.observe(env, state)
            mean = learner.act(actor, observation)
            drawn = jax.random.truncated_normal(key, -mean / sigma, (1 - mean) / sigma, (2,))
            action = jnp.where(noise > 0, jnp.clip(mean + sigma * drawn, 0, 1), mean)
            option = environment.nearest(env, state, action)
            state = environment.step(env, state, option)
            return state, (option, observation, state.action)

        keys = jax.random.split(key, env.decisions)
        return jax.lax.scan(decide, environment.reset(env), keys)[1]

    return jax.vmap(one)(jax.random.split(key, len(noise)), noise)


@partial(jax.jit, static_argnames="learner", donate_argnames="agent")
def learn(
    learner: Learner,
    agent: Agent,
    observations: Array,
    actions: Array,
    rewards: Array,
    best: Array,
    baseline: Array,
    count: Array,
    updates: Array,
    key: Array,
) -> Agent:
    """Stores an episode, and trains actor and critic on transitions of the buffer.

    Args:
      learner: static.
      agent: donated.
      observations: [decisions, observation] of the episode.
      actions: [decisions, 2].
      rewards: [replay], of the episode in each slot of the buffer.
      best: [elite] int32, slots of the best episodes.
      baseline: what is taken from each reward.
      count: how many episodes there have been, this one included.
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
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        shape = (learner.batch_size,)
        which = jax.random.randint(keys[0], shape, 0, jnp.minimum(count, replay))
        when = jax.random.randint(keys[1], shape, 0, decisions)
        then = agent.observations[which, jnp.minimum(when + 1, decisions - 1)]
        value = learner.value(agent.target_critic, then, learner.act(agent.target_actor, then))
        target = (rewards[which] - baseline) / decisions
        target += jnp.where(when < decisions - 1, value, 0.0)
        good = jax.random.choice(keys[2], best, shape)
        return _descend(
            learner,
            agent,
            (agent.observations[which, when], agent.actions[which, when], target),
            (agent.observations[good, when], agent.actions[good, when]),
        )

    return jax.lax.fori_loop(0, updates, update, agent)


def _descend(
    learner: Learner,
    agent: Agent,
    batch: tuple[Array, Array, Array],
    best: tuple[Array, Array],
) -> Agent:
    """A step of the critic, then one of the actor; the targets follow.

    Args:
      learner: static.
      agent: what steps.
      batch: observations, actions, and the critic's targets.
      best: observations and actions of the best episodes, that the actor imitates.
    """
    observation, action, target = batch

    def critic_loss(params: Any) -> Array:
        return jnp.square(learner.value(params, observation, action) - target).mean()

    grads = jax.grad(critic_loss)(agent.critic)
    optimizer = optax.adam(learner.critic_learning_rate)
    updates, critic_state = optimizer.update(grads, agent.critic_state)
    critic = optax.apply_updates(agent.critic, updates)

    def actor_loss(params: Any) -> Array:
        value = learner.value(critic, observation, learner.act(params, observation)).mean()
        away = jnp.square(learner.act(params, best[0]) - best[1]).sum(-1).mean()
        return learner.imitate * away - agent.actions.shape[1] * value

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
    rewards are ranks (see `rewards`), shared out over the decisions; the networks are normalized;
    the actor also imitates the best episodes there were (arXiv:1709.10089, of its own instead of a
    demonstrator's: most of what it learns from few evaluations comes of that); a policy that was
    proposed before is drawn again, with more noise each time.

    Args:
      problem: with sensitivities, which the agent observes; zeros without.
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
      imitate: weight of the squared distance to the actions of the best episodes, beside the value
        of the actor's own.
      elite: how many are the best.
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
        self._replay, self._elite, self._updates = replay, elite, updates
        self._agent = create(self._learner, self._env, replay, self._key)
        self._warmup, self._last = round(warmup * evaluations), round(0.9 * evaluations)
        self._noise, self._least_noise = noise, least_noise
        self._policies: list[Policy] = []
        self._scores: list[float] = []
        self._pending: list[Array] = []  # observations and actions of the policy proposed last

    def propose(self) -> list[Policy]:
        count = len(self._policies)
        if count >= self._evaluations:
            return []
        noise = self._sigma(count)
        more = max(noise, LEAST) * MORE ** np.arange(DRAWS - 1)
        drawn, *transitions = episodes(
            self._learner,
            self._agent.actor,
            self._env,
            jax.random.fold_in(self._key, 2 * count),
            np.array([noise, *more], np.float32),
        )
        policies = environment.checked(self._problem, np.asarray(drawn))
        new = next((i for i, one in enumerate(policies) if one not in self._policies), 0)
        self._policies.append(policies[new])
        self._pending = [x[new] for x in transitions]
        return [policies[new]]

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        if not scores:
            return
        self._scores.extend(scores)
        count = len(self._scores)
        kept = np.arange(max(0, count - self._replay), count)
        ranked = rewards(self._scores[kept[0] :], len(kept))
        slots = np.zeros(self._replay, np.float32)
        slots[kept % self._replay] = ranked
        best = kept[np.argsort(-ranked, kind="stable")[: self._elite]] % self._replay
        self._agent = learn(
            self._learner,
            self._agent,
            *self._pending,
            slots,
            np.resize(best, self._elite),  # repeated, if there are fewer
            np.float32(np.average(ranked, weights=0.95 ** (count - 1 - kept))),
            count,
            self._updates if count >= self._warmup else 0,
            jax.random.fold_in(self._key, 2 * count - 1),
        )

    def _sigma(self, count: int) -> float:
        """The noise of an episode, after so many."""
        if count < self._warmup:
            return np.inf
        if count >= self._last:
            return 0.0
        through = (count - self._warmup) / max(self._last - self._warmup, 1)
        return self._noise ** (1 - through) * self._least_noise**through
