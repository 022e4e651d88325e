"""The course of the quantizers while a network trains with them."""

from typing import Any

import flax.struct
import jax.numpy as jnp

from kdq import quantize
from kdq.distill import schedule
from kdq.distill.schedule import Schedule
from kdq.fields import limits_of
from kdq.quantize import oscillation
from kdq.schema import Qat
from kdq.types import Array, Metrics, QParams


class Regime(flax.struct.PyTreeNode):
    """Schedules over the share of training done; one that is None costs nothing."""

    least_bits: Schedule | None = None  # quantizers have at least so many
    dampen: Schedule | None = None  # weight of `oscillation.dampening`
    freeze: Schedule | None = None  # oscillations a step above which a weight stops
    steps: Array | float = 1.0  # of the whole training

    def quantizers(self, qparams: QParams, step: Array) -> QParams:
        """Returns the quantizers that this step computes with."""
        if self.least_bits is None:
            return qparams
        return quantize.widened(qparams, self.least_bits(self._progress(step)))

    def penalty(self, params: Any, qparams: QParams, step: Array) -> Array | float:
        """Returns a summand of the loss."""
        if self.dampen is None:
            return 0.0
        return self.dampen(self._progress(step)) * oscillation.dampening(params, qparams)

    def track_oscillations(
        self, state: dict[str, Any], params: Any, qparams: QParams, step: Array
    ) -> tuple[dict[str, Any], Any, Metrics]:
        """Returns oscillations after an update, parameters with frozen weights, and shares."""
        if not state:
            return state, params, {}
        threshold = 1.0 if self.freeze is None else self.freeze(self._progress(step))
        state, params = oscillation.update(state, params, qparams, threshold)
        return state, params, oscillation.share(state)

    def _progress(self, step: Array) -> Array:
        return jnp.asarray(step, jnp.float32) / self.steps


def build(recipe: Qat, steps: int, where: str) -> Regime:
    """Builds the regime of an arm that trains for `steps`; ConfigError for a bad schedule."""
    parts = {
        name: schedule.build(getattr(recipe, name), f"{where}.{name}", limits_of(Qat, name))
        for name in ("least_bits", "dampen", "freeze")
        if getattr(recipe, name)
    }
    return Regime(**parts, steps=jnp.float32(steps))
