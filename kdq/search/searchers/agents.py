"""The parts that learning agents share: networks, episodes, updates, and scores as rewards."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special

from kdq.search import environment
from kdq.search.environment import Environment, State
from kdq.search.problem import Problem
from kdq.search.searcher import Searcher
from kdq.types import Array


class MLP(nn.Module):
    """A multilayer perceptron, its hidden layers normalized: many updates from few episodes."""

    hidden: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`x`: [..., inputs] float32, to [..., outputs]; small at first."""
        for width in self.hidden:
            x = nn.relu(nn.LayerNorm()(nn.Dense(width)(x)))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.normal(1e-2))(x)


def init(actor: MLP, critic: MLP, env: Environment, key: Array, actions: int = 0) -> dict[str, Any]:
    """Returns params {"actor", "critic"}; the critic also sees an action of `actions` numbers."""
    observation = environment.observe(env, environment.reset(env))
    actor_key, critic_key = jax.random.split(key)
    return {
        "actor": actor.init(actor_key, observation),
        "critic": critic.init(critic_key, jnp.append(observation, jnp.zeros(actions))),
    }


def episode(
    env: Environment, decide: Callable[[Array, State, Array], tuple[Array, Any]], key: Array
) -> tuple[Array, Array, Array, Any]:
    """Builds a policy; `decide` maps key, state and observation to an option and what to keep.

    Returns options [decisions] int32, observations [decisions, observation], projected actions
    [decisions, 2], and what `decide` keeps, [decisions, ...].
    """

    def step(state: State, key: Array) -> tuple[State, tuple]:
        observation = environment.observe(env, state)
        option, kept = decide(key, state, observation)
        state = environment.step(env, state, option)
        return state, (option, observation, state.action, kept)

    return jax.lax.scan(step, environment.reset(env), jax.random.split(key, env.decisions))[1]


def descend(
    loss: Callable[[Any], Array], params: Any, state: optax.OptState, learning_rate: float
) -> tuple[Any, optax.OptState]:
    """Takes a step of Adam; returns the new params and state."""
    updates, state = optax.adam(learning_rate).update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


def rewards(scores: Sequence[float], size: int) -> np.ndarray:
    """Returns scores by ranks, as quantiles of a normal distribution; zeros up to `size` [size].

    The best so far has the most. Scores of any unit and spread give the same, and rewards do not
    fade as policies come to differ less. Equal scores share their mean; one that is not finite
    counts as the worst.
    """
    values = np.nan_to_num(np.asarray(scores, float), nan=np.inf, posinf=np.inf)
    worse = (values[:, None] < values).sum(1) + (values[:, None] == values).sum(1) / 2
    ranked = np.zeros(size, np.float32)
    ranked[: len(values)] = special.ndtri(worse / max(len(values), 1))
    return ranked


class Learner(Searcher):
    """A searcher that learns to act; without sensitivities in the problem it observes zeros."""

    needs: ClassVar[tuple[str, ...]] = ("sensitivity",)

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Any):
        self._settings, self._evaluations = settings, evaluations
        self._problem, self._env = problem, environment.build(problem)
        self._key = jax.random.key(seed)
