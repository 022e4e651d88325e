"""Histograms against np.histogram and np.percentile in float64, over all that streamed by."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations

from kdq.quantize import MSE, Percentile, grid, histogram
from kdq.quantize.histogram import BINS

GRID = {"bits": 8, "symmetric": True, "signed": True, "narrow": False}
ADD = jax.jit(histogram.add)


def _edges(limit):
    """As the module describes them, from the limit downwards."""
    side = np.linspace(limit / 8, limit, 7 * BINS // 8 + 1)
    for octave in range(24):
        top = limit / 8 / 2**octave
        side = np.concatenate([np.linspace(top / 2, top, 257)[:-1], side])
    side = np.concatenate([np.linspace(0, side[0], 257)[:-1], side])
    return np.concatenate([-side[::-1], side[1:]])


def _limit(values):
    return 2.0 ** np.frexp(np.abs(values).max())[1]


def _state(batches):
    state = histogram.empty(len(batches[0]))
    for batch in batches:
        state = ADD(state, jnp.asarray(batch))
    return state


def _counts(state, group=0):
    """Exact, in int64."""
    ones, carried = (np.asarray(v, np.int64) for v in (state.ones, state.carried))
    assert ones.max() < 2**16
    return (carried * 2**16 + ones)[group]


def _batches(factor=1.0):
    """Three batches of different magnitudes: [groups, elements] float32."""
    rng = np.random.default_rng(0)
    spread = np.array([[1.0], [0.01], [300.0]]) * factor
    shape = (3, 900)
    return [np.float32(f * spread * rng.standard_t(2, size=shape)) for f in (1.0, 5.0, 0.3)]


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6, 4096.0])
def test_counts_exactly_while_the_limit_doubles(factor):
    batches = _batches(factor)
    state = _state(batches)
    everything = np.concatenate(batches, axis=1)
    for group, values in enumerate(everything.astype(np.float64)):
        limit = _limit(values)
        assert 2.0 ** int(state.exponent[group]) == limit
        np.testing.assert_array_equal(_counts(state, group), np.histogram(values, _edges(limit))[0])
        equal = np.histogram(values, np.linspace(-limit, limit, 2 * BINS + 1))[0]
        np.testing.assert_array_equal(state.linear().counts[group], equal)


@pytest.mark.parametrize("largest", [(4.0, 5.0, 0.0), (1.0, 2.0, 4.0), (-8.0, 1e-3, 8.0)])
def test_the_order_of_batches_is_forgotten(largest):
    """Powers of two, where bins begin, and batches of zeros, which have no magnitude, too."""
    rng = np.random.default_rng(0)
    batches = [np.float32(m * np.append(rng.uniform(-1, 1, size=899), 1.0))[None] for m in largest]
    batches = [np.repeat(batch, 3, axis=0) for batch in batches]  # the shapes of the test above
    states = [_state(order) for order in itertools.permutations(batches)]
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state, states[0])
    everything = np.concatenate(batches, axis=1)[0].astype(np.float64)
    wanted = np.histogram(everything, _edges(_limit(everything)))[0]
    np.testing.assert_array_equal(_counts(states[0]), wanted)


def test_what_lies_on_an_edge_is_in_the_bin_that_begins_there():
    values = np.float32(
        [0.0, -0.0, 0.5, -0.5, 0.75, 1 / 8, -1 / 8, 2.0**-27, -(2.0**-27), 2.0**-28]
    )
    state = _state([values[None]])
    wanted = np.histogram(values.astype(np.float64), _edges(1.0))[0]
    np.testing.assert_array_equal(_counts(state), wanted)


def _crowded(times):
    """900 values of which each has been seen `times` times."""
    values = np.float32(np.random.default_rng(1).normal(size=(3, 900)))
    state = _state([values])
    counts = [_counts(state, group) * times for group in range(3)]
    digits = np.uint32([[c % 2**16 for c in counts], [c // 2**16 for c in counts]])
    return values, state.replace(ones=jnp.asarray(digits[0]), carried=jnp.asarray(digits[1]))


@pytest.mark.parametrize("times", [2**12, 2**24, 2**33 + 1])
def test_counts_never_wrap(times):
    """Of 4e6, 1.5e10 and 7.7e12 values, before and after 900 more of which the limit doubles."""
    values, state = _crowded(times)
    after = ADD(state, 3 * values)
    for group in range(3):
        wanted = (
            times * np.histogram(np.float64(values[group]), _edges(_limit(3 * values[group])))[0]
        )
        wanted += np.histogram(np.float64(3 * values[group]), _edges(_limit(3 * values[group])))[0]
        np.testing.assert_array_equal(_counts(after, group), wanted)
    # A range is that of each value once, but for the float32 of the counts.
    for observer in (Percentile(90.0), MSE()):
        for many, once in zip(
            observer.range(state, **GRID), observer.range(_state([values]), **GRID), strict=True
        ):
            np.testing.assert_allclose(many, once, rtol=1e-6)


def _outlier(size):
    rng = np.random.default_rng(3)
    values = rng.normal(size=(3, 9000))
    values[:, 100] = np.array([1, -1, 1]) * size
    return values


DRAWS = {
    "normal": lambda rng: rng.normal(size=(3, 9000)),
    "shifted": lambda rng: rng.normal(5, 0.1, size=(3, 9000)),
    "heavy tails": lambda rng: rng.standard_t(1.5, size=(3, 9000)),
    "log-normal": lambda rng: rng.lognormal(0, 4, size=(3, 9000)),
    "rectified": lambda rng: np.maximum(rng.normal(size=(3, 9000)), 0),
    "negative": lambda rng: -rng.exponential(size=(3, 9000)),
    "uniform": lambda rng: rng.uniform(-1, 3, size=(3, 9000)),
    "two sizes": lambda rng: rng.normal(size=(3, 9000)) * rng.choice([1e-3, 100], (3, 9000)),
    "tiny": lambda rng: 1e-30 * rng.normal(size=(3, 9000)),
    "huge": lambda rng: 5e37 * rng.normal(size=(3, 9000)),
    **{
        f"outlier of {size:.0e}": lambda _, size=size: _outlier(size)
        for size in (1e2, 1e4, 1e6, 1e9)
    },
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("percentile", [80.0, 99.0, 99.9])
def test_percentiles_are_those_of_numpy(name, percentile):
    """Within half a bin, 1/512 of the value, of the values next to NumPy's in float64.

    Of values below 2^-27 of the limit a bin is 2^-35 of it: with an outlier of 1e9 half is 0.016.
    """
    everything = np.float32(DRAWS[name](np.random.default_rng(2)))
    state = _state(np.split(everything, 3, axis=1))
    low, high = Percentile(percentile).range(state, **GRID)
    for group, values in enumerate(everything.astype(np.float64)):
        two_sided = values.min() < 0 < values.max()
        share = (100 - percentile) / (2 if two_sided else 1)
        for side, q, cut in (
            (low[group], share, values.min() < 0),
            (high[group], 100 - share, values.max() > 0),
        ):
            if not cut:
                q = 0 if q == share else 100
            near = [np.percentile(values, q, method=how) for how in ("lower", "higher")]
            slack = max(np.abs(near)) / 512 + _limit(values) * 2.0**-36
            assert min(near) - slack <= side <= max(near) + slack


def test_one_program_serves_every_batch():
    states = [histogram.empty(3)]
    with count_compilations(ADD.__name__) as compiled:
        for batch in (*_batches(), *_batches(1e9)):
            states.append(ADD(states[-1], batch))
    assert len(compiled) <= 1


LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "signed"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("ends", [(-1.0, 1.0), (0.0, 1.0), (-1.0, 0.0), (-0.9, 0.1)])
def test_ranges_up_to_the_ends_of_float32(bits, symmetric, signed, ends):
    low, high = (np.float32(end * LARGEST) for end in ends)
    quantizer = grid.from_range(low, high, bits, symmetric=symmetric, signed=signed)
    points = np.asarray(grid.points(quantizer), np.float64)
    assert np.isfinite(points).all()
    scale = np.float64(quantizer.scale)
    assert 0 < scale <= 2.0**126
    reach = max(-min(low, 0.0), high) if symmetric else None
    if bits == 8:  # nearly as if there were no end
        wanted = (
            np.float64(reach) / (127 if signed else 255)
            if symmetric
            else ((np.float64(high) - np.float64(low)) / 255)
        )
        np.testing.assert_allclose(scale, wanted, rtol=0.02)
    values = np.float32(np.linspace(float(low), float(high), 11))
    rounded = np.asarray(grid.from_codes(grid.to_codes(jnp.asarray(values), quantizer), quantizer))
    # The nearest of the points, in float64; ties and rounding of a code's place aside.
    distance = np.abs(np.float64(values)[:, None] - points)
    chosen = np.abs(np.float64(values) - rounded)
    assert (chosen <= distance.min(1) + 1e-5 * scale).all()


@pytest.mark.parametrize("observer", [Percentile(99.0), MSE()])
def test_observers_of_huge_and_tiny_values_choose_as_for_others(observer):
    """All of them scale by a power of two, and the range with them."""
    values = np.float32(np.random.default_rng(4).standard_t(3, size=(3, 900)))
    values *= np.float32(4 / np.abs(values).max())
    reference = [np.asarray(v) for v in observer.range(_state([values]), **GRID)]
    for power in (124, 90, -90):
        factor = np.float32(2.0**power)
        for state in (_state([values * factor]), observer.exact(jnp.asarray(values * factor))):
            for side, wanted in zip(observer.range(state, **GRID), reference, strict=True):
                np.testing.assert_allclose(np.asarray(side) / factor, wanted, rtol=0.03)
