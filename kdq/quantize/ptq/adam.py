"""Adam for many steps in one compiled loop."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from kdq.types import Array


def adam(
    loss: Callable[[tuple, Array], Array],
    state: tuple[tuple, Any],
    rates: Sequence[Array],
    first: Array | int,
    last: Array | int,
    until: Array | float = math.inf,
) -> tuple[tuple, Any]:
    """(parameters, moments) after the steps from `first` to before `last`.

    Args:
      loss: (parameters, step) -> scalar.
      state: parameters, a tuple of trees, and `optax.scale_by_adam().init` of them.
      rates: learning rates, one for each member of the parameters.
      first: step.
      last: step.
      until: the rates fall in a straight line from step 0 to nothing here.
    """
    optimizer = optax.scale_by_adam()

    def step(i, state):
        trained, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(trained, i), moments)
        moved = (
            jax.tree.map(lambda p, u, rate=rate * (1 - i / until): p - rate * u, own, update)
            for own, update, rate in zip(trained, updates, rates, strict=True)
        )
        return tuple(moved), moments

    return jax.lax.fori_loop(first, last, step, state)
