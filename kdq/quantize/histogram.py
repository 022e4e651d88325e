"""Histograms of what streams by: bins as fine as the values are small, counts that never wrap.

Of either sign there are 8192 bins. Magnitudes from limit / 8 up have bins of limit / 2048; below
that each of 24 octaves has 256; below those 256 equal ones end at 0. So a value is known to 1/256
of itself, even if one far outlier has moved the limit to 10^8 times of what the others are.

The limit is a power of two above every magnitude. When it doubles, each bin falls whole into one of
the new ones: memory is bounded, no count is smeared, and the order of the batches is forgotten.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kdq.types import Array

BINS = 2048  # of equal width between 0 and the limit, see `Histogram.linear`
_OCTAVE = 256  # bins
_OCTAVES = 24
_SIDE = _OCTAVE * _OCTAVES + BINS  # bins of one sign
_LEAST = 2.0**-27  # share of the limit below which bins are equal again
_LEAST_EXPONENT, _MOST_EXPONENT = -100, 128  # of the limit: what float32 has, and its squares
_BASE_BITS = 16  # of the lower of a count's two digits


def _centres() -> np.ndarray:
    """The middle of every bin of the positive side, as a share of the limit: [bins] float64."""
    low = np.arange(_OCTAVE) * _LEAST / _OCTAVE
    octaves = _LEAST * 2.0 ** np.arange(_OCTAVES)[:, None] * (1 + np.arange(_OCTAVE) / _OCTAVE)
    edges = np.concatenate([low, octaves.ravel(), np.arange(BINS // 8, BINS + 1) / BINS])
    return (edges[1:] + edges[:-1]) / 2


_CENTRES = np.float32(_centres())
_SIGNED_CENTRES = np.concatenate([-_CENTRES[::-1], _CENTRES])
_EQUAL_BIN = np.floor(_SIGNED_CENTRES * BINS).astype(np.int32) + BINS  # of `linear`, of each bin


class Extremes(flax.struct.PyTreeNode):
    """The smallest and largest value so far, each `[groups]`; +inf and -inf before any."""

    low: Array
    high: Array

    def bounds(self) -> tuple[Array, Array]:
        return self.low, self.high

    def update(self, x: Array, counts: Array | None = None) -> "Extremes":
        """With those of `x` [groups, elements] that count."""
        low = high = x
        if counts is not None:
            low, high = jnp.where(counts, x, jnp.inf), jnp.where(counts, x, -jnp.inf)
        return Extremes(jnp.minimum(self.low, low.min(-1)), jnp.maximum(self.high, high.max(-1)))


def no_extremes(groups: int) -> Extremes:
    """Those of no value."""
    # A dtype, or they would be weakly typed, and the second batch would compile anew.
    empty = jnp.full(groups, jnp.inf, jnp.float32)
    return Extremes(low=empty, high=-empty)


class Ranked(NamedTuple):
    """Values in ascending order, and how many there are up to each from either end.

    All are `[groups, n]`; counts are int32, or float32 where there are more than it holds.
    """

    values: Array
    up_to: Array  # of values that are no larger, itself among them
    down_to: Array  # of values that are no smaller


class Samples(flax.struct.PyTreeNode):
    """Values with multiplicities, both `[groups, n]`."""

    values: Array
    counts: Array  # int32, or float32 where there are more than it holds

    def bounds(self) -> tuple[Array, Array]:
        return self.values.min(-1), self.values.max(-1)

    def samples(self) -> "Samples":
        return self

    def ranked(self) -> Ranked:
        order = jnp.argsort(self.values, axis=-1)
        counts = jnp.take_along_axis(self.counts, order, -1)
        return Ranked(
            values=jnp.take_along_axis(self.values, order, -1),
            up_to=jnp.cumsum(counts, axis=-1),
            down_to=jax.lax.cumsum(counts, axis=1, reverse=True),
        )


class Histogram(flax.struct.PyTreeNode):
    """Counts over the bins of `[-limit, limit]`, of each group, and the exact extremes.

    Values within a bin are taken to be at its centre, or at the exact extreme where that is nearer
    the inside. A count has two digits, since JAX has no int64 by default: up to 2^47 values.
    """

    ones: Array  # [groups, bins] uint32 below 2^16
    carried: Array  # [groups, bins] uint32, in units of 2^16
    exponent: Array  # [groups] int32: the limit is 2 to the power of this
    extremes: Extremes

    def bounds(self) -> tuple[Array, Array]:
        return self.extremes.bounds()

    def samples(self) -> Samples:
        """The bins' centres with their counts."""
        counts = _as_float(self.ones, self.carried)
        return Samples(values=self._inside(_SIGNED_CENTRES), counts=counts)

    def ranked(self) -> Ranked:
        sums = [
            _as_float(*(jax.lax.cumsum(v, axis=1, reverse=r) for v in (self.ones, self.carried)))
            for r in (False, True)
        ]
        return Ranked(self._inside(_SIGNED_CENTRES), *sums)

    def linear(self) -> Samples:
        """The same in `2 * BINS` bins of one width."""
        merge = lambda v: jnp.zeros((len(v), 2 * BINS), v.dtype).at[:, _EQUAL_BIN].add(v)
        centres = (np.arange(2 * BINS, dtype=np.float32) + 0.5) / BINS - 1
        counts = _as_float(merge(self.ones), merge(self.carried))
        return Samples(values=self._inside(centres), counts=counts)

    def _inside(self, shares: np.ndarray) -> Array:
        """Shares of the limit as values [groups, n], within the extremes."""
        half = jnp.ldexp(jnp.float32(1), self.exponent - 1)[:, None]  # of 2^128, which is none
        low, high = (e[:, None] for e in (self.extremes.low, self.extremes.high))
        return jnp.clip(2 * shares * half, low, high)


def empty(groups: int) -> Histogram:
    """The histogram of no value."""
    digits = jnp.zeros((groups, 2 * _SIDE), jnp.uint32)
    exponent = jnp.full(groups, _LEAST_EXPONENT, jnp.int32)
    return Histogram(digits, digits, exponent, no_extremes(groups))


def add(state: Histogram, x: Array, counts: Array | None = None) -> Histogram:
    """The histogram with the values `x` [groups, elements] float32, fewer than 2^31 a group.

    `counts` [groups, elements] bool is false at those that are left out.
    """
    extremes = state.extremes.update(x, counts)
    x = x if counts is None else jnp.where(counts, x, 0)
    each = jnp.uint32(1) if counts is None else counts.astype(jnp.uint32)
    reach = jnp.abs(x).max(-1)
    # Not log2, which is off by an ulp.
    needed = jnp.where(reach > 0, jnp.frexp(reach)[1], _LEAST_EXPONENT)
    exponent = jnp.clip(jnp.maximum(state.exponent, needed), _LEAST_EXPONENT, _MOST_EXPONENT)
    doubled = exponent - state.exponent
    # Most batches double nothing.
    digits = jax.lax.cond(
        jnp.any(doubled > 0), _moved, lambda digits, _: digits, (state.ones, state.carried), doubled
    )
    # Twice half of the power, since 2^-128 is none that float32 is quick with.
    halves = exponent // 2, exponent - exponent // 2
    first, second = (jnp.ldexp(jnp.float32(1), -half)[:, None] for half in halves)
    index = _signed_bin(x * first * second)
    each = jnp.broadcast_to(each, index.shape)
    ones = jax.vmap(lambda ones, at, each: ones.at[at].add(each))(digits[0], index, each)
    ones, carried = _carry(ones, digits[1])
    return Histogram(ones, carried, exponent, extremes)


def _signed_bin(share: Array) -> Array:
    """The bin of each share of the limit: in [0, 2 * _SIDE)."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(share), jnp.int32)
    # A bin holds its lower edge, which of a negative one is the larger magnitude.
    negative = share < 0
    bits = jnp.where(negative, jnp.maximum(bits - 1, 0), bits)
    index = _bin(jax.lax.bitcast_convert_type(bits, jnp.float32), bits)
    return jnp.where(negative, _SIDE - 1 - index, _SIDE + index)


def _bin(share: Array, bits: Array) -> Array:
    """The bin of its side of each nonnegative share, which as float32 has those bits."""
    # Exponent and 8 digits of a float32 number the bins of the octaves; that of _LEAST is 100.
    octave = jnp.right_shift(bits, 15) - (100 - 1) * _OCTAVE
    equal = lambda width: jnp.floor(share / width).astype(jnp.int32)
    lowest = equal(_LEAST / _OCTAVE)
    highest = _OCTAVE * _OCTAVES + equal(1 / BINS)
    index = jnp.where(share < _LEAST, lowest, jnp.where(share < 1 / 8, octave, highest))
    return jnp.clip(index, 0, _SIDE - 1)


def _moved(digits: tuple[Array, Array], doubled: Array) -> tuple[Array, Array]:
    """The counts after the limit has doubled so many times, in each group."""

    def move(doubled: Array, *digits: Array) -> tuple[Array, ...]:
        share = _CENTRES * jnp.ldexp(jnp.float32(1), -jnp.minimum(doubled, 100))
        index = _bin(share, jax.lax.bitcast_convert_type(share, jnp.int32))
        to = jnp.concatenate([_SIDE - 1 - index[::-1], _SIDE + index])
        # Sums of 8192 digits below 2^16 are below 2^29.
        return tuple(jnp.zeros_like(v).at[to].add(v) for v in digits)

    return _carry(*jax.vmap(move)(doubled, *digits))


def _carry(ones: Array, carried: Array) -> tuple[Array, Array]:
    return ones & jnp.uint32(2**_BASE_BITS - 1), carried + (ones >> _BASE_BITS)


def _as_float(ones: Array, carried: Array) -> Array:
    """Exact up to 2^24, within 2^-23 of itself above."""
    return carried.astype(jnp.float32) * 2.0**_BASE_BITS + ones.astype(jnp.float32)
