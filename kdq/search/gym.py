"""The environment by Gymnasium's API, so that others' agents can search; needs `kdq[search]`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdq.deploy import extras
from kdq.fields import ConfigError, unknown
from kdq.search import environment
from kdq.search.problem import Policy, Problem

(gymnasium,) = extras.load("search", "gymnasium")

MODES = ("continuous", "discrete")

_allowed, _nearest = jax.jit(environment.allowed), jax.jit(environment.nearest)
_observe, _step = jax.jit(environment.observe), jax.jit(environment.step)


class BitsEnv(gymnasium.Env):
    """An episode is a policy, a step one decision; the reward comes at the end: minus the score.

    Observations are those of `environment.observe`. A continuous action is two numbers from -1 to
    1: where the option is between the least and the most, of a layer's weights and of its inputs. A
    discrete one is an option's index. Either way the allowed option nearest to it is taken, so that
    no budget is ever exceeded. `info` has

    - "action_mask": [options] int8, 1 of those allowed now, for `Discrete.sample`; all 1 after the
      last step;
    - after each step, "action": the projected one, which an agent had better learn from;
    - after the last, "policy", a tuple of options, "score", and "costs" by metric.

    `score` maps policies to the objective of each; less is better.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, Gymnasium's own annotation

    def __init__(
        self,
        problem: Problem,
        score: Callable[[list[Policy]], Sequence[float]],
        mode: Literal["continuous", "discrete"] = "continuous",
    ):
        if mode not in MODES:
            raise ConfigError(unknown("mode", mode, MODES))
        self._problem, self._score, self._mode = problem, score, mode
        self._env = environment.build(problem)
        self._state = environment.reset(self._env)
        size = _observe(self._env, self._state).size
        # The problem's features are about 0 to 1, not quite; all else is.
        low = min(0.0, float(self._env.features.min(initial=0.0)))
        high = max(1.0, float(self._env.features.max(initial=1.0)))
        self.observation_space = gymnasium.spaces.Box(low, high, (size,), np.float32)
        if mode == "continuous":
            self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        else:
            self.action_space = gymnasium.spaces.Discrete(self._env.options)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self._state = environment.reset(self._env)
        return self._observation(), {"action_mask": self._mask()}

    def step(
        self, action: np.ndarray | int
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._ended:
            raise gymnasium.error.ResetNeeded("the policy is complete: call reset")
        if self._mode == "continuous":
            place = jnp.clip((jnp.asarray(action, jnp.float32) + 1) / 2, 0.0, 1.0)
        elif self.action_space.contains(action):
            place = self._env.places[self._state.position, action]
        else:
            raise gymnasium.error.InvalidAction(
                f"{action!r}: expected 0 to {self._env.options - 1}"
            )
        option = int(_nearest(self._env, self._state, place))
        if self._mode == "discrete" and _allowed(self._env, self._state)[action]:
            option = int(action)  # another may have the same place
        self._state = _step(self._env, self._state, option)
        place = 2 * np.asarray(self._state.action) - 1
        info: dict[str, Any] = {
            "action_mask": self._mask(),
            "action": place if self._mode == "continuous" else option,
        }
        reward = 0.0
        if self._ended:
            policy = self._problem.projected(np.asarray(self._state.policy))
            (score,) = self._score([policy])
            costs = self._problem.total(policy)
            info |= {"policy": policy, "score": float(score), "costs": costs}
            reward = -float(score)
        return self._observation(), reward, self._ended, False, info

    @property
    def _ended(self) -> bool:
        return int(self._state.position) == self._env.decisions

    def _mask(self) -> np.ndarray:
        if self._ended:
            return np.ones(self._env.options, np.int8)
        return np.asarray(_allowed(self._env, self._state), np.int8)

    def _observation(self) -> np.ndarray:
        return np.asarray(_observe(self._env, self._state))
