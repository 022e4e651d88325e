"""Rounding that is learned: each weight between the two codes around it (AdaRound, 2004.10568).

A weight w lies between the numbers `low` and `high` of two neighbouring codes. A variable V chooses
between them, softly while it trains, `low + h(V) (high - low)`, and in the end by `h(V) >= 1/2`.
For integer codes this is the paper's `s (clip(floor(w / s + z) + h(V), qmin, qmax) - z)`; stated by
neighbours it also holds for number formats. Outside the limits both neighbours are the limit.

Every function takes a whole stack of layers too, as told by its quantizer (see `grid.over_stack`).
"""

import jax
import jax.numpy as jnp

from kdq.quantize import grid
from kdq.quantize.grid import Quantizer
from kdq.types import Array

# The sigmoid is stretched to (GAMMA, ZETA) and cut to [0, 1], so that 0 and 1 are reached.
ZETA, GAMMA = 1.1, -0.1
# Of the regularizer's exponent, from the end of the warm-up to the last step.
FIRST_BETA, LAST_BETA, WARM_UP = 20.0, 2.0, 0.2


def rectified_sigmoid(v: Array) -> Array:
    """h(V) = clip(sigmoid(V) (ζ - γ) + γ, 0, 1), elementwise; ζ = 1.1, γ = -0.1."""
    return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


def inverse(h: Array) -> Array:
    """The V at which `rectified_sigmoid` is h, for h from 0 to 1."""
    probability = (h - GAMMA) / (ZETA - GAMMA)
    return jnp.log(probability) - jnp.log1p(-probability)


def regularizer(v: Array, beta: Array | float) -> Array:
    """Σ 1 - |2 h(V) - 1|^β over the elements: 0 where all are decided, at most 1 for each."""
    return (1 - jnp.abs(2 * rectified_sigmoid(v) - 1) ** beta).sum()


def annealed_beta(step: Array | int, steps: Array | int) -> tuple[Array, Array]:
    """(β, on): the exponent at `step` of `steps`, and whether the regularizer counts yet, 0 or 1.

    During the first fifth of the steps it does not; then β falls from 20 to 2 in a straight line.
    """
    done = (step / steps - WARM_UP) / (1 - WARM_UP)
    beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * jnp.clip(done, 0, 1)
    return beta, jnp.float32(done >= 0)


def start(weight: Array, quantizer: Quantizer) -> tuple[Array, Array]:
    """Where learning starts: the codes below `weight`, and the V whose soft weight is `weight`.

    Both are float32 of the shape of `weight`; the codes are not clipped to the limits.
    """
    return grid.over_stack(_start, quantizer)(weight, quantizer)


def _start(weight: Array, quantizer: Quantizer) -> tuple[Array, Array]:
    resolved = grid.with_rounded_scale(quantizer)
    if quantizer.levels is None:
        position = grid.position(weight, resolved.scale, resolved.zero_point)
        below = jnp.floor(position)
        return below, inverse(position - below)
    relative = grid.position(weight, resolved.scale, jnp.float32(0))
    levels = quantizer.levels
    below = jnp.searchsorted(levels, relative, side="right") - 1
    inside = jnp.clip(below, 0, len(levels) - 2)
    h = (relative - levels[inside]) / (levels[inside + 1] - levels[inside])
    return below.astype(jnp.float32), inverse(jnp.clip(h, 0, 1))


def neighbours(below: Array, quantizer: Quantizer) -> tuple[Array, Array]:
    """The numbers of the codes `below` and of those above them, both clipped to the limits."""

    def one(below: Array, quantizer: Quantizer) -> tuple[Array, Array]:
        low, high = (
            grid.from_codes(jnp.clip(codes, quantizer.qmin, quantizer.qmax), quantizer)
            for codes in (below, below + 1)
        )
        return low, high

    return grid.over_stack(one, quantizer)(below, quantizer)


def soft(below: Array, v: Array, quantizer: Quantizer) -> Array:
    """The weight while it trains, float32: between its neighbours by h(V).

    Differentiable in V and in the quantizer's scale and zero point; the codes below are held.
    """
    low, high = neighbours(below, quantizer)
    return low + rectified_sigmoid(v) * (high - low)


def hard(below: Array, v: Array, quantizer: Quantizer) -> Array:
    """The weight as decided, float32 and on the grid: the upper neighbour where h(V) >= 1/2."""
    low, high = neighbours(below, quantizer)
    return jnp.where(rectified_sigmoid(v) >= 0.5, high, low)
