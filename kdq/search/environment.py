"""An episode that builds one policy, decision by decision, within the budgets; all of it in JAX.

Every function is pure and works under `jit`, `vmap` and `scan`. Budgets are compared in whole
numbers of 56 bits, each as two int32 (JAX has no 64 bits by default): sums are exact, and none that
float32 would round is let past a limit.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import struct

from kdq.search.problem import ROUNDING, Problem
from kdq.types import Array

LOW_BITS = 28  # of a whole number, in the second int32: several may be added before they carry


@struct.dataclass
class Environment:
    """A problem as arrays. Costs are in whole units, beyond the cheapest option of the decision.

    Whole numbers have a last axis of 2: high part, and low part in [0, 2**LOW_BITS) once carried.
    """

    valid: Array  # [students, decisions, options] bool
    costs: Array  # [metrics, students, decisions, options, 2] int32, 0 or more
    # What each way to end well costs from a decision on: [reserves, metrics, students,
    # decisions + 1, 2] int32.
    needs: Array
    capacity: Array  # [metrics, students, 2] int32; below 0 of a student that no policy affords
    most: Array  # [metrics, students, decisions] float32: what the rest may cost, from this one on
    reserve: Array  # [decisions] int32: a policy that keeps the limits
    places: Array  # [decisions, options, 2] float32, of void options 0
    features: Array  # [students, decisions, features] float32
    sensitivity: Array  # [students, decisions, 2] float32, see `_sensitivity`

    @property
    def decisions(self) -> int:
        return self.places.shape[0]

    @property
    def options(self) -> int:
        return self.places.shape[1]


@struct.dataclass
class State:
    """A policy that is being built."""

    position: Array  # int32: the decision to be taken; the number of decisions at the end
    policy: Array  # [decisions] int32, -1 from `position` on
    spent: Array  # [metrics, 2] int32, as the costs
    action: Array  # [2] float32: the place of the option taken last

    @property
    def student(self) -> Array:
        """int32; the first, until it is decided."""
        return jnp.maximum(self.policy[0], 0)


def build(problem: Problem) -> Environment:
    """Returns the environment of a problem; without sensitivities, those observed are 0."""
    students, decisions, options = problem.valid.shape
    places = np.zeros((decisions, options, 2), np.float32)
    for i, decision in enumerate(problem.decisions):
        places[i, : len(decision.options)] = decision.places
    costs = np.zeros((len(problem.limits), *problem.valid.shape), np.int64)
    capacity = np.zeros((len(problem.limits), students), np.int64)
    for i, metric in enumerate(problem.limits):
        costs[i], capacity[i] = _exact(problem, metric)
    ways = problem.reserves  # [reserves, students, decisions]
    taken = costs[:, np.arange(students)[:, None], np.arange(decisions), ways]
    needs = np.zeros((*taken.shape[:-1], decisions + 1), np.int64)  # [metrics, reserves, ...]
    needs[..., :-1] = taken[..., ::-1].cumsum(-1)[..., ::-1]
    return Environment(
        valid=jnp.asarray(problem.valid),
        costs=_split(costs),
        needs=_split(needs.swapaxes(0, 1)),
        capacity=_split(capacity),
        most=jnp.asarray(costs.max(-1)[..., ::-1].cumsum(-1)[..., ::-1], jnp.float32),
        reserve=jnp.asarray(problem.reserve, jnp.int32),
        places=jnp.asarray(places),
        features=jnp.asarray(problem.features, jnp.float32),
        sensitivity=jnp.asarray(_sensitivity(problem, places), jnp.float32),
    )


def reset(env: Environment) -> State:
    """Returns the start of an episode."""
    return State(
        position=jnp.int32(0),
        policy=jnp.full(env.decisions, -1, jnp.int32),
        spent=jnp.zeros((env.capacity.shape[0], 2), jnp.int32),
        action=jnp.zeros(2, jnp.float32),
    )


def allowed(env: Environment, state: State) -> Array:
    """Returns which options of this decision leave a way to end within the limits, [options] bool.

    At least one does: the reserve that an option was allowed for also has a next option.
    """
    options = jnp.arange(env.options)
    # The student that each option means.
    students = jnp.minimum(options, env.valid.shape[0] - 1)
    student = jnp.where(state.position == 0, students, state.student)
    at = (student, state.position, options)
    need = env.needs[:, :, student, state.position + 1]  # [reserves, metrics, options, 2]
    total = _carry(state.spent[:, None] + env.costs[(slice(None), *at)] + need)
    limit = env.capacity[:, student]  # [metrics, options, 2]
    less = total[..., 0] < limit[..., 0]
    equal = total[..., 0] == limit[..., 0]
    within = less | (equal & (total[..., 1] <= limit[..., 1]))
    fits = within.all(1).any(0) & env.valid[at]
    # None at all, if only rounding kept the one policy there is from the limit: at the first
    # decision, so at every one.
    return jnp.where(fits.any(), fits, options == env.reserve[state.position])


def observe(env: Environment, state: State) -> Array:
    """Returns what an agent sees before it decides, [observation] float32 between about 0 and 1.

    In this order: the problem's features of the decision; its position, 0 to 1; of each budget, how
    much of what the rest could still spend is left, beyond what it must; the place of the option
    taken last (2, first 0); how sensitive the decision is (2: its least option, its middle one).
    Before the student is decided, those of the first student.
    """
    student, position = state.student, jnp.minimum(state.position, env.decisions - 1)
    high, low = jnp.moveaxis((env.capacity[:, student] - state.spent).astype(jnp.float32), -1, 0)
    left = high * 2.0**LOW_BITS + low
    most = env.most[:, student, position]
    share = jnp.where(most > 0, left / jnp.where(most > 0, most, 1.0), 1.0)
    return jnp.concatenate(
        [
            env.features[student, position],
            state.position[None].astype(jnp.float32) / max(env.decisions - 1, 1),
            jnp.clip(share, 0.0, 1.0),
            state.action,
            env.sensitivity[student, position],
        ]
    )


def nearest(env: Environment, state: State, action: Array) -> Array:
    """Returns the allowed option whose place is nearest to `action` ([2] float32, 0 to 1)."""
    away = jnp.square(env.places[state.position] - action).sum(-1)
    return jnp.where(allowed(env, state), away, jnp.inf).argmin().astype(jnp.int32)


def step(env: Environment, state: State, option: Array) -> State:
    """Returns the state after taking an allowed option; its `action` is the projected one."""
    student = jnp.where(state.position == 0, option, state.student)
    cost = env.costs[:, student, state.position, option]
    return State(
        position=state.position + 1,
        policy=state.policy.at[state.position].set(option),
        spent=_carry(state.spent + cost),
        action=env.places[state.position, option],
    )


def _exact(problem: Problem, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns whole units: costs [students, decisions, options], capacity [students], int64.

    A unit is a power of two and all together stay below 2**53 of them: costs that are integers are
    exact, and others rounded up.
    """
    costs, constant = problem.costs[metric], problem.constants[metric]
    limit = problem.limits[metric] + ROUNDING * abs(problem.limits[metric])
    whole = abs(limit) + np.abs(constant).max() + np.abs(costs).max(-1).sum(-1).max()
    _, exponent = math.frexp(float(whole))
    units = np.ldexp(np.where(problem.valid, costs, np.inf), 53 - exponent)
    least = units.min(-1, keepdims=True)
    beyond = np.where(problem.valid, units - least, 0.0)
    capacity = np.ldexp(limit - constant, 53 - exponent) - least[..., 0].sum(-1)
    if exponent > 53 or any((x != np.round(x)).any() for x in (costs, constant)):
        # What float64 may round, in these sums and in those of the problem.
        capacity = capacity - 4 * (costs.shape[1] + 1)
    return np.ceil(beyond).astype(np.int64), np.floor(capacity).astype(np.int64)


def _split(x: np.ndarray) -> Array:
    """Splits whole numbers below 2**56 into two int32."""
    return jnp.asarray(np.stack([x >> LOW_BITS, x & (2**LOW_BITS - 1)], -1), jnp.int32)


def _carry(x: Array) -> Array:
    return jnp.stack([x[..., 0] + (x[..., 1] >> LOW_BITS), x[..., 1] & (2**LOW_BITS - 1)], -1)


def _sensitivity(problem: Problem, places: np.ndarray) -> np.ndarray:
    """Returns by how much a decision's least and middle option are worse than its best.

    [students, decisions, 2], on a logarithmic scale from 0 (a millionth of the worst) to 1.
    """
    students, decisions, _ = problem.valid.shape
    harms = np.zeros((students, decisions, 2))
    if problem.sensitivity is None:
        return harms
    for s, d in np.ndindex(students, decisions):
        if d:
            options = np.flatnonzero(problem.valid[s, d])
            options = options[places[d, options].sum(-1).argsort(kind="stable")]
            harm = problem.sensitivity[s, d, options]
            harms[s, d] = np.array([harm[0], harm[len(harm) // 2]]) - harm.min()
    floor = max(harms.max() * 1e-6, 1e-300)
    return np.log(np.maximum(harms, floor) / floor) / math.log(1e6)
