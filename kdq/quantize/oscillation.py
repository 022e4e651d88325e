"""Weights that jump to and fro between two codes while they train (arXiv:2203.11086).

Under the straight-through estimator a weight near a decision threshold is pushed over it at one
step and back at the next: it never settles, and batch-norm statistics and the last steps suffer.
Here they are counted, damped, and frozen.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kdq.quantize.grid import Quantizer, from_codes, over_stack, to_codes
from kdq.quantize.kinds import weight_name
from kdq.quantize.paths import copied
from kdq.quantize.ste import transformed
from kdq.types import Array, QParams

MOMENTUM = 0.02  # of the moving averages: they look back over about 1 / MOMENTUM steps
FREQUENT = 0.005  # oscillations a step above which the paper counts a weight as oscillating


class Oscillation(flax.struct.PyTreeNode):
    """The history of one weight tensor; every array has its shape."""

    codes: Array  # float32, of the last step
    direction: Array  # float32, the sign of the last change of code; 0 before any
    frequency: Array  # float32, moving average of "oscillated at this step"
    average: Array  # float32, moving average of the code
    frozen: Array  # bool


def init(params: Any, qparams: QParams) -> dict[str, Oscillation]:
    """The state before the first step, for each layer whose weight is quantized."""
    state = {}
    for path, quantizers in qparams.items():
        if "weights" in quantizers:
            codes = _codes(params, path, quantizers["weights"])
            zeros = jnp.zeros_like(codes)
            state[path] = Oscillation(codes, zeros, zeros, codes, zeros.astype(bool))
    return state


def update(
    state: dict[str, Oscillation], params: Any, qparams: QParams, threshold: Array | float
) -> tuple[dict[str, Oscillation], Any]:
    """The state after a step, and the parameters with what oscillates too often put to rest.

    A weight oscillates at a step if its code changes in the direction opposite to its last change.
    One that does so more often than `threshold` a step is frozen at the code that it had on
    average, and stays there.

    Args:
      state: of before the step.
      params: as the optimizer left them.
      qparams: the quantizers now.
      threshold: oscillations a step, 0 to 1; 1 and above freezes nothing.

    Returns:
      The new state; `params` with frozen weights where their codes are.
    """
    params, after = dict(params), {}
    for path, past in state.items():
        quantizer = qparams[path]["weights"]
        codes = _codes(params, path, quantizer)
        codes = jnp.where(past.frozen, past.codes, codes)
        change = jnp.sign(codes - past.codes)
        oscillated = (change != 0) & (change == -past.direction)
        frequency = past.frequency + MOMENTUM * (oscillated - past.frequency)
        average = past.average + MOMENTUM * (codes - past.average)
        stops = (frequency > threshold) & ~past.frozen
        codes = jnp.where(stops, jnp.round(average), codes)
        frozen = past.frozen | stops
        after[path] = Oscillation(
            codes=codes,
            direction=jnp.where(change != 0, change, past.direction),
            frequency=frequency,
            average=average,
            frozen=frozen,
        )
        layer = copied(params, path, "oscillations")
        name = weight_name(layer)
        resting = over_stack(from_codes, quantizer)(codes, quantizer)
        layer[name] = jnp.where(frozen, resting.astype(layer[name].dtype), layer[name])
    return after, params


def dampening(params: Any, qparams: QParams) -> Array:
    """Σ (ŵ - clip(w))² over all quantized weights, ŵ the rounded weight, held fixed.

    It pulls each weight towards the code that it is nearest to, and leaves clipped ones alone.
    """
    total = jnp.float32(0)
    for path, quantizers in qparams.items():
        if "weights" not in quantizers:
            continue
        quantizer = jax.lax.stop_gradient(quantizers["weights"])
        layer = copied(dict(params), path, "qparams")
        total += over_stack(_distance, quantizer)(layer[weight_name(layer)], quantizer).sum()
    return total


def share(state: dict[str, Oscillation]) -> dict[str, Array]:
    """Shares of all quantized weights: "oscillating" (more often than FREQUENT), and "frozen"."""
    size = sum(layer.codes.size for layer in state.values())
    # Added up in float32: over all layers there may be more than an int32 counts.
    counted = lambda flags: jnp.sum(flags).astype(jnp.float32)
    oscillating = sum(counted(layer.frequency > FREQUENT) for layer in state.values())
    frozen = sum(counted(layer.frozen) for layer in state.values())
    return {"oscillating": oscillating / size, "frozen": frozen / size}


def _distance(weight: Array, quantizer: Quantizer) -> Array:
    weight = transformed(weight, quantizer)
    ends = [from_codes(jnp.broadcast_to(q, weight.shape), quantizer) for q in _ends(quantizer)]
    rounded = jax.lax.stop_gradient(from_codes(to_codes(weight, quantizer), quantizer))
    return jnp.sum(jnp.square(rounded - jnp.clip(weight, *ends)))


def _ends(quantizer: Quantizer) -> tuple[Array, Array]:
    return quantizer.qmin, quantizer.qmax


def _codes(params: Any, path: str, quantizer: Quantizer) -> Array:
    layer = copied(dict(params), path, "qparams")
    encode = lambda w, q: to_codes(transformed(w, q), q)
    return over_stack(encode, quantizer)(layer[weight_name(layer)], quantizer)
