"""Observers: what range of values a quantizer should cover.

An observer is a frozen object with pure methods. `update` folds one batch, grouped as
`[groups, elements]` (a group shares a scale), into a state; `range` turns the state into
`(low, high)`, each `[groups]`. A weight is seen whole: `exact` summarizes it without binning.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kdq.quantize import grid, histogram
from kdq.quantize.histogram import BINS, Extremes, Histogram, Samples
from kdq.types import Array


class State(Protocol):
    """The state of an observer: a pytree."""

    def bounds(self) -> tuple[Array, Array]:
        """The exact smallest and largest value seen, each `[groups]`."""


class Observer(Protocol):
    def init(self, groups: int) -> State:
        """The state before any data."""

    def update(self, state: State, x: Array, counts: Array | None = None) -> State:
        """The state after `x` [groups, elements]; safe under `jit`.

        `counts` [groups, elements] bool is false at what is padding; None: all of `x` counts.
        """

    def exact(self, x: Array) -> State:
        """The state of a tensor `[groups, elements]` that is seen once and whole."""

    def range(self, state: State, **grid_args: Any) -> tuple[Array, Array]:
        """`(low, high)`, each `[groups]`; `grid_args` are those of `grid.from_range`."""


class _ExtremesObserver:
    def init(self, groups: int) -> Extremes:
        return histogram.no_extremes(groups)

    def update(self, state: Extremes, x: Array, counts: Array | None = None) -> Extremes:
        return state.update(x.astype(jnp.float32), counts)

    def exact(self, x: Array) -> Extremes:
        return self.update(self.init(x.shape[0]), x)

    def range(self, state: Extremes, **grid_args: Any) -> tuple[Array, Array]:
        return state.low, state.high


@dataclasses.dataclass(frozen=True)
class MinMax(_ExtremesObserver):
    """From the smallest to the largest value seen."""


@dataclasses.dataclass(frozen=True)
class AbsMax(_ExtremesObserver):
    """±the largest magnitude seen; from 0 if nothing was negative."""

    def range(self, state: Extremes, **grid_args: Any) -> tuple[Array, Array]:
        reach = jnp.maximum(-state.low, state.high)
        return jnp.where(state.low < 0, -reach, 0.0), reach


@dataclasses.dataclass(frozen=True)
class MovingAverage(_ExtremesObserver):
    """Exponential moving average of each batch's extremes (arXiv:1712.05877)."""

    momentum: float = 0.9  # weight of the past; the first batch counts whole

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum!r}: expected 0 <= momentum < 1")

    def update(self, state: Extremes, x: Array, counts: Array | None = None) -> Extremes:
        fresh = state.low > state.high  # not isfinite: a NaN or infinity must stay to be reported

        def blend(past, now):
            mixed = self.momentum * jnp.where(fresh, 0.0, past) + (1 - self.momentum) * now
            return jnp.where(fresh, now, mixed)

        seen = self.init(x.shape[0]).update(x.astype(jnp.float32), counts)
        return jax.tree.map(blend, state, seen)


class _HistogramObserver:
    def init(self, groups: int) -> Histogram:
        return histogram.empty(groups)

    def update(self, state: Histogram, x: Array, counts: Array | None = None) -> Histogram:
        return histogram.add(state, x.astype(jnp.float32), counts)

    def exact(self, x: Array) -> Samples:
        x = x.astype(jnp.float32)
        return Samples(values=x, counts=jnp.ones_like(x, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Percentile(_HistogramObserver):
    """Covers the central `percentile` percent of the values (half of the rest cut on each side).

    A side on which no value lies (a ReLU's output) is not cut: the other takes it all. A weight's
    range ends at values that it has; an input's is known to 1/512 of itself, however far the values
    reach that are cut off (see `histogram`).
    """

    percentile: float = 99.9

    def __post_init__(self):
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile!r}: expected 50 < percentile <= 100")

    def range(self, state: Histogram | Samples, **grid_args: Any) -> tuple[Array, Array]:
        return _percentile_range(state, self.percentile / 100)


@jax.jit
def _percentile_range(state: Histogram | Samples, kept: Array) -> tuple[Array, Array]:
    ranked, (lowest, highest) = state.ranked(), state.bounds()
    two_sided = ((lowest < 0) & (highest > 0))[:, None]
    cut = jnp.where(two_sided, (1 - kept) / 2, 1 - kept) * ranked.up_to[:, -1:]
    # Counted from either end: the little that is cut off from above would drown in the whole.
    first = jnp.argmax(ranked.up_to > cut, -1)[:, None]
    last = ranked.values.shape[-1] - 1 - jnp.argmax(ranked.down_to[:, ::-1] > cut, -1)[:, None]
    low = jnp.take_along_axis(ranked.values, first, -1)[:, 0]
    high = jnp.take_along_axis(ranked.values, last, -1)[:, 0]
    return jnp.where(lowest < 0, low, lowest), jnp.where(highest > 0, high, highest)


@dataclasses.dataclass(frozen=True)
class _ShrunkObserver(_HistogramObserver):
    """The best of `candidates` shrunk copies of min-max."""

    candidates: int = 100

    def __post_init__(self):
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates!r}: expected at least 1")

    def range(self, state: Histogram | Samples, **grid_args: Any) -> tuple[Array, Array]:
        bits = jnp.asarray(grid_args.pop("bits"), jnp.float32)
        options = tuple(sorted(grid_args.items()))
        return self._find_best(state, bits, self.candidates, options)


class MSE(_ShrunkObserver):
    """The range, among `candidates` shrunk copies of min-max, of least squared rounding error."""

    def _find_best(self, state: Histogram | Samples, *args: Any) -> tuple[Array, Array]:
        return _least_squares_range(state.samples(), state.bounds(), *args)


@partial(jax.jit, static_argnames=("candidates", "options"))
def _least_squares_range(
    samples: Samples,
    bounds: tuple[Array, Array],
    bits: Array,
    candidates: int,
    options: tuple[tuple[str, bool], ...],
) -> tuple[Array, Array]:
    values, (low, high) = samples.values, (bound[:, None] for bound in bounds)
    # Errors in units of a power of two near the largest value: else squares would overflow.
    exponent = jnp.frexp(jnp.maximum(-low, high))[1]
    unit = jnp.ldexp(jnp.float32(1), jnp.clip(-exponent, -126, 126))

    def error(ratio):
        quantizer = grid.from_range(ratio * low, ratio * high, bits, **dict(options))
        rounded = grid.from_codes(grid.to_codes(values, quantizer), quantizer)
        return (samples.counts * jnp.square((rounded - values) * unit)).sum(-1)

    # From the whole range downwards: argmin takes the first of equals, so ties cut nothing.
    ratios = jnp.arange(candidates, 0, -1, dtype=jnp.float32) / candidates
    best = ratios[jnp.argmin(jax.lax.map(error, ratios), axis=0)]
    return best * low[:, 0], best * high[:, 0]


class Entropy(_ShrunkObserver):
    """The range, among `candidates` shrunk copies of min-max, that loses least information.

    KL(P || Q) of two histograms over the same fine bins is least (S. Migacz, "8-bit inference with
    TensorRT", GTC 2017). P holds all values, those that the candidate clips in the outermost bin
    that is neither clipped nor empty. Q holds those that it does not clip, after rounding: what
    falls on one code is spread evenly over the bins of that code that are not empty in P.

    Bins meet codes by rounding to the candidate's own grid, so that any bits and signs will do,
    where TensorRT splits them into 128 equal runs. The bin that holds 0 counts as much as the next
    one: the zeros of a ReLU are exact on every grid, and would else ask for the smallest. For the
    many values of an input: the histogram of a small group of weights is mostly holes.
    """

    def _find_best(self, state: Histogram | Samples, *args: Any) -> tuple[Array, Array]:
        return _least_divergence_range(state, *args)


@partial(jax.jit, static_argnames=("candidates", "options"))
def _least_divergence_range(
    state: Histogram | Samples,
    bits: Array,
    candidates: int,
    options: tuple[tuple[str, bool], ...],
) -> tuple[Array, Array]:
    ratios = jnp.arange(candidates, 0, -1, dtype=jnp.float32) / candidates

    def one(state: Histogram | Samples) -> tuple[Array, Array]:
        state = jax.tree.map(lambda v: v[None], state)
        if isinstance(state, Samples):  # of a whole tensor, each counted once
            state = histogram.add(histogram.empty(1), state.values)
        bins = state.linear()
        values, counts = bins.values[0], bins.counts[0]
        counts = counts.at[BINS].set(counts[BINS + 1])
        low, high = (bound[0] for bound in state.bounds())

        def divergence(ratio: Array) -> Array:
            quantizer = grid.from_range(ratio * low, ratio * high, bits, **dict(options))
            return _divergence(values, counts, quantizer)

        # From the whole range downwards: argmin takes the first of equals, so ties cut nothing.
        best = ratios[jnp.argmin(jax.lax.map(divergence, ratios))]
        return best * low, best * high

    # Groups a few at a time: a weight may have more of them than histograms fit into memory.
    return jax.lax.map(one, state, batch_size=16)


MOST_CODES = 256  # of 8 bits, and of every format


def _divergence(values: Array, counts: Array, quantizer: grid.Quantizer) -> Array:
    """KL(P || Q) for bins at `values` [bins], ascending, with `counts`; see `Entropy`."""
    codes = grid.to_codes(values, quantizer)
    if quantizer.levels is None:
        unclipped = jnp.round(grid.position(values, quantizer.scale, quantizer.zero_point))
        below, above = unclipped < quantizer.qmin, unclipped > quantizer.qmax
    else:
        position = grid.position(values, quantizer.scale, jnp.float32(0))
        slack = 1e-5 * quantizer.levels[-1]  # the largest value over the scale is only nearly it
        below, above = (
            position < quantizer.levels[0] - slack,
            position > quantizer.levels[-1] + slack,
        )
    inside = ~(below | above)
    kept = jnp.where(inside, counts, 0)
    first, last = jnp.argmax(kept > 0), kept.size - 1 - jnp.argmax(kept[::-1] > 0)
    clipped = [jnp.where(side, counts, 0).sum() for side in (below, above)]
    p = kept.at[first].add(clipped[0]).at[last].add(clipped[1])
    bins = (codes - quantizer.qmin).astype(jnp.int32)
    of_code = lambda v: jnp.zeros(MOST_CODES).at[bins].add(v)[bins]
    full = p > 0
    members = of_code(jnp.where(full, 1.0, 0.0))
    q = jnp.where(full, of_code(kept) / jnp.maximum(members, 1), 0)
    p, q = (v / jnp.maximum(v.sum(), 1e-30) for v in (p, q))
    return jnp.where(full, p * (jnp.log(jnp.where(full, p, 1)) - jnp.log(q)), 0).sum()
