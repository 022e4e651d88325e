"""Weights that change while a student trains."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from kdq.fields import NO_LIMITS, ConfigError, Limits, check_arguments, unknown
from kdq.types import Array


class Schedule(flax.struct.PyTreeNode):
    """A number by the share of training done: points, and what lies between them.

    The points are data, so that runs that differ only in numbers share a compiled step.
    Invariant: `at` [points] rises strictly, within 0 to 1; `values` [points] are finite.
    """

    at: Array
    values: Array
    between: str = flax.struct.field(pytree_node=False)  # a key of BETWEEN

    def __call__(self, progress: Array) -> Array:
        """The value, a float32 scalar, when `progress` (0 to 1) of the steps are done."""
        return BETWEEN[self.between](progress, self.at, self.values)


def _steps(progress: Array, at: Array, values: Array) -> Array:
    phase = jnp.searchsorted(jnp.asarray(at), progress, side="right") - 1
    return jnp.asarray(values)[jnp.maximum(phase, 0)]


def _cosine(progress: Array, at: Array, values: Array) -> Array:
    done = jnp.interp(progress, at, jnp.arange(len(at), dtype=jnp.float32))
    return jnp.interp(
        jnp.floor(done) + (1 - jnp.cos(jnp.pi * (done % 1))) / 2, jnp.arange(len(at)), values
    )


BETWEEN = {"steps": _steps, "linear": jnp.interp, "cosine": _cosine}


def constant(value: float) -> Schedule:
    return _schedule("steps", [0.0], [value])


def linear(start: float, end: float, since: float = 0.0, until: float = 1.0) -> Schedule:
    """From `start` to `end` in a straight line while the progress goes from `since` to `until`."""
    return _schedule("linear", [since, until], [start, end])


def cosine(start: float, end: float, since: float = 0.0, until: float = 1.0) -> Schedule:
    """From `start` to `end` along half a cosine."""
    return _schedule("cosine", [since, until], [start, end])


def warmup(value: float, until: float) -> Schedule:
    """From 0 to `value` in a straight line, then `value` (as DKD wants it, arXiv:2203.08679)."""
    return linear(0.0, value, until=until)


def phases(values: tuple[float, ...], starts: tuple[float, ...]) -> Schedule:
    """`values[i]` from `starts[i]` on; the first phase starts at 0."""
    if not starts or starts[0] != 0:
        raise ValueError(f"phases: starts={tuple(starts)} must begin with 0")
    if len(values) != len(starts):
        raise ValueError(f"phases: {len(values)} values for {len(starts)} starts")
    return _schedule("steps", starts, values)


def _schedule(between: str, at: Any, values: Any) -> Schedule:
    with np.errstate(over="ignore"):  # an infinity is refused below
        at, values = np.float32(at), np.float32(values)
    if not (np.all(np.diff(at) > 0) and at[0] >= 0 and at[-1] <= 1):
        raise ValueError(f"points of a schedule must rise from 0 to 1 at most, given {at.tolist()}")
    if not np.isfinite(values).all():
        raise ValueError(f"values of a schedule must be finite, given {values.tolist()}")
    return Schedule(at=at, values=values, between=between)


KINDS = {f.__name__: f for f in (constant, linear, cosine, warmup, phases)}


def build(config: float | Mapping[str, Any], where: str, limits: Limits = NO_LIMITS) -> Schedule:
    """A schedule from a config value: a number, or `{"kind": "linear", "start": 0, "end": 1}`.

    A kind is a function of this module. Raises ConfigError, which names the key `where`, for an
    unknown kind or argument, a missing one, or values that are out of range.
    """
    if not isinstance(config, Mapping):
        config = {"kind": "constant", "value": config}
    fields = dict(config)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError(unknown(f"{where}.kind:", kind, KINDS))
    check_arguments(KINDS[kind], fields, where)
    try:
        made = KINDS[kind](**fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: {error}") from error
    for value in made.values.tolist():
        limits.check(value, where)
    return made
