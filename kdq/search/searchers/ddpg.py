"""Deep deterministic policy gradients over a policy's decisions, after HAQ (arXiv:1811.08886)."""

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

# Episodes drawn for one proposal: the first with the noise that is due, and others, should that
# policy have been proposed before, with more of it: at least LEAST, each by the factor MORE.
DRAWS, LEAST, MORE = 8, 0.02, 1.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of DDPG; static, so that agents with equal ones share what is compiled."""

    hidden: tuple[int, ...] = (32, 32)  # widths of both networks
    actor_learning_rate: float = 1e-3  # of Adam
    critic_learning_rate: float = 1e-3  # of Adam
    tau: float = 0.05  # share by which the target networks follow at each update
    batch_size: int = 64  # transitions an update
    updates: int = 25  # after each episode
    replay: int = 1000  # episodes that the buffer holds
    warmup: float = 0.1  # share of the evaluations with random actions, before anything is learned
    noise: float = 0.3  # standard deviation after the warm-up
    least_noise: float = 0.05  # and at the last tenth; it falls exponentially
    # Weight of the squared distance to the actions of the best episodes, beside the actor's value.
    imitate: float = 30.0
    elite: int = 8  # how many episodes are the best


@struct.dataclass
class Agent:
    """All that learns, and the replay buffer."""

    params: Any  # {"actor", "critic"}
    targets: Any  # the same, following
    states: dict[str, optax.OptState]  # of each
    observations: Array  # [replay, decisions, observation] float32
    actions: Array  # [replay, decisions, 2] float32: the projected ones


@struct.dataclass
class Feedback:
    """The knowledge of the episodes in the buffer, the last one included."""

    rewards: Array  # [replay], of the episode in each slot
    best: Array  # [elite] int32, slots of the best episodes
    baseline: Array  # taken from each reward
    count: Array  # episodes so far
    updates: Array  # how many to make now


def act(settings: Settings, actor: Any, observation: Array) -> Array:
    """Returns the action, [..., 2] in (0, 1), for [..., observation]."""
    return jax.nn.sigmoid(MLP(settings.hidden, 2).apply(actor, observation))


def evaluate(settings: Settings, critic: Any, observation: Array, action: Array) -> Array:
    """Returns the rewards to come, [...], for [..., observation] and [..., 2]."""
    inputs = jnp.concatenate([observation, action], -1)
    return MLP(settings.hidden, 1).apply(critic, inputs)[..., 0]


def create(settings: Settings, env: Environment, key: Array) -> Agent:
    """Returns a new agent with an empty buffer."""
    params = agents.init(MLP(settings.hidden, 2), MLP(settings.hidden, 1), env, key, actions=2)
    size = environment.observe(env, environment.reset(env)).size
    rates = {"actor": settings.actor_learning_rate, "critic": settings.critic_learning_rate}
    return Agent(
        params=params,
        targets=jax.tree.map(jnp.copy, params),  # both are donated
        states={name: optax.adam(rate).init(params[name]) for name, rate in rates.items()},
        observations=jnp.zeros((settings.replay, env.decisions, size)),
        actions=jnp.zeros((settings.replay, env.decisions, 2)),
    )


@partial(jax.jit, static_argnames="settings")
def episodes(
    settings: Settings, actor: Any, env: Environment, key: Array, noise: Array
) -> tuple[Array, Array, Array]:
    """Builds policies, each with its own `noise` [episodes] around the actor's actions.

    The standard deviation of a normal distribution, truncated to where actions are; infinite for a
    uniform one, 0 for none. Returns policies [episodes, decisions] int32, observations [episodes,
    decisions, observation], and projected actions [episodes, decisions, 2].
    """

    def build(key: Array, noise: Array) -> tuple[Array, Array, Array, Any]:
        sigma = jnp.clip(noise, 1e-3, 1e3)

        def decide(key: Array, state: State, observation: Array) -> tuple[Array, None]:
            mean = act(settings, actor, observation)
            drawn = jax.random.truncated_normal(key, -mean / sigma, (1 - mean) / sigma, (2,))
            action = jnp.where(noise > 0, jnp.clip(mean + sigma * drawn, 0, 1), mean)
            return environment.nearest(env, state, action), None

        return agents.episode(env, decide, key)

    return jax.vmap(build)(jax.random.split(key, len(noise)), noise)[:3]


@partial(jax.jit, static_argnames="settings", donate_argnames="agent")
def learn(
    settings: Settings, agent: Agent, episode: tuple[Array, Array], feedback: Feedback, key: Array
) -> Agent:
    """Stores an episode (observations, actions), and trains on transitions of the buffer."""
    replay, decisions = agent.actions.shape[:2]
    slot = (feedback.count - 1) % replay
    agent = agent.replace(
        observations=agent.observations.at[slot].set(episode[0]),
        actions=agent.actions.at[slot].set(episode[1]),
    )

    def update(i: Array, agent: Agent) -> Agent:
        # A batch of transitions: any stored episodes, at any of their decisions.
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        shape = (settings.batch_size,)
        which = jax.random.randint(keys[0], shape, 0, jnp.minimum(feedback.count, replay))
        when = jax.random.randint(keys[1], shape, 0, decisions)
        # The critic's target: the transition's share of the reward, and the value of the next.
        then = agent.observations[which, jnp.minimum(when + 1, decisions - 1)]
        action = act(settings, agent.targets["actor"], then)
        value = evaluate(settings, agent.targets["critic"], then, action)
        target = (feedback.rewards[which] - feedback.baseline) / decisions
        target += jnp.where(when < decisions - 1, value, 0.0)
        good = jax.random.choice(keys[2], feedback.best, shape)
        return _update(
            settings,
            agent,
            (agent.observations[which, when], agent.actions[which, when], target),
            (agent.observations[good, when], agent.actions[good, when]),
        )

    return jax.lax.fori_loop(0, feedback.updates, update, agent)


def _update(
    settings: Settings,
    agent: Agent,
    batch: tuple[Array, Array, Array],  # observations, actions, and the critic's targets
    best: tuple[Array, Array],  # observations and actions that the actor imitates
) -> Agent:
    """Takes a step of the critic, then one of the actor; the targets follow."""
    observation, action, target = batch

    def critic_loss(critic: Any) -> Array:
        return jnp.square(evaluate(settings, critic, observation, action) - target).mean()

    critic, critic_state = descend(
        critic_loss, agent.params["critic"], agent.states["critic"], settings.critic_learning_rate
    )

    def actor_loss(actor: Any) -> Array:
        value = evaluate(settings, critic, observation, act(settings, actor, observation)).mean()
        away = jnp.square(act(settings, actor, best[0]) - best[1]).sum(-1).mean()
        return settings.imitate * away - agent.actions.shape[1] * value

    actor, actor_state = descend(
        actor_loss, agent.params["actor"], agent.states["actor"], settings.actor_learning_rate
    )
    params = {"actor": actor, "critic": critic}
    return agent.replace(
        params=params,
        targets=optax.incremental_update(params, agent.targets, settings.tau),
        states={"actor": actor_state, "critic": critic_state},
    )


class DDPG(Learner):
    """One episode a proposal: an actor that acts with noise, and a critic that learns its value.

    As in HAQ the reward of the whole policy is given to each of its transitions, less an average of
    the last ones, γ is 1, and the noise is normal, truncated to where actions are. Unlike HAQ,
    rewards are ranks (see `rewards`), shared out over the decisions; the networks are normalized;
    the actor also imitates the best episodes so far (arXiv:1709.10089, its own instead of a
    demonstrator's: most of what it learns from few evaluations comes of that); a policy that was
    proposed before is drawn again, with more noise each time. In the last tenth of the evaluations
    the agent acts without noise.
    """

    Settings = Settings

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Settings):
        super().__init__(problem, seed=seed, evaluations=evaluations, settings=settings)
        self._agent = create(settings, self._env, self._key)
        self._warmup = round(settings.warmup * evaluations)
        self._last = round(0.9 * evaluations)
        self._policies: list[Policy] = []
        self._scores: list[float] = []
        self._pending: tuple[Array, Array]  # observations and actions of the policy proposed last

    def propose(self) -> list[Policy]:
        count = len(self._policies)
        if count >= self._evaluations:
            return []
        through = (count - self._warmup) / max(self._last - self._warmup, 1)
        noise = self._settings.noise ** (1 - through) * self._settings.least_noise**through
        if count < self._warmup:
            noise = np.inf
        elif count >= self._last:
            noise = 0.0
        more = max(noise, LEAST) * MORE ** np.arange(DRAWS - 1)
        drawn, observations, actions = episodes(
            self._settings,
            self._agent.params["actor"],
            self._env,
            jax.random.fold_in(self._key, 2 * count),
            np.array([noise, *more], np.float32),
        )
        policies = [self._problem.projected(policy) for policy in np.asarray(drawn)]
        new = next((i for i, policy in enumerate(policies) if policy not in self._policies), 0)
        self._policies.append(policies[new])
        self._pending = observations[new], actions[new]
        return [policies[new]]

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        if not scores:
            return
        self._scores.extend(scores)
        count, replay, elite = len(self._scores), self._settings.replay, self._settings.elite
        kept = np.arange(max(0, count - replay), count)
        ranked = rewards(self._scores[kept[0] :], len(kept))
        slots = np.zeros(replay, np.float32)
        slots[kept % replay] = ranked
        best = kept[np.argsort(-ranked, kind="stable")[:elite]] % replay
        feedback = Feedback(
            rewards=slots,
            best=np.resize(best, elite),  # repeated, if there are fewer
            baseline=np.float32(np.average(ranked, weights=0.95 ** (count - 1 - kept))),
            count=count,
            updates=self._settings.updates if count >= self._warmup else 0,
        )
        key = jax.random.fold_in(self._key, 2 * count - 1)
        self._agent = learn(self._settings, self._agent, self._pending, feedback, key)
