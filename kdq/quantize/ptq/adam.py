"""Adam on several trees, each at a rate of its own, a step at a time.

Loops over the steps are Python's: XLA's CPU backend computes a convolution inside of a compiled
loop on one thread and without its fast kernels, 24 times slower where it was measured.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdq.types import Array

State = tuple[tuple, Any]  # (parameters, a tuple of trees; moments)

_MOMENTS = optax.scale_by_adam()


def start(parameters: tuple) -> State:
    """The state before the first step, of arrays of its own: steps may donate it."""
    parameters = jax.tree.map(jnp.array, parameters)
    return parameters, _MOMENTS.init(parameters)


def step(
    loss: Callable[[tuple, Array], Array],
    state: State,
    rates: Sequence[Array],
    number: Array | int,
    until: Array | float = math.inf,
) -> State:
    """The state after one more step; to be called in a `jit`.

    `loss` is (parameters, number) -> scalar, `number` that of this step, from 0. There is a rate
    for each tree of the parameters; they fall in a straight line from step 0 to nothing at `until`.
    """
    parameters, moments = state
    updates, moments = _MOMENTS.update(jax.grad(loss)(parameters, number), moments)
    moved = (
        jax.tree.map(lambda p, u, rate=rate * (1 - number / until): p - rate * u, tree, update)
        for tree, update, rate in zip(parameters, updates, rates, strict=True)
    )
    return tuple(moved), moments
