"""Each observer against a brute-force float64 count over all batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.quantize import MSE, AbsMax, MinMax, MovingAverage, Percentile
from kdq.quantize.histogram import BINS

OBSERVERS = (AbsMax(), MinMax(), MovingAverage(0.6), Percentile(99.0), MSE())
GRID = {"bits": 4, "symmetric": True, "signed": True, "narrow": False}


_update = functools.partial(jax.jit, static_argnums=0)(lambda o, state, x: o.update(state, x))


def _batches(seed=0, positive=False):
    """Three batches of different magnitudes: [groups, elements] float32."""
    rng = np.random.default_rng(seed)
    spread = np.array([[1.0], [0.01], [300.0]])
    batches = [
        (factor * spread * rng.standard_t(4, size=(3, 900))).astype(np.float32)
        for factor in (1.0, 5.0, 0.3)
    ]
    return [np.abs(b) for b in batches] if positive else batches


def _state(observer, batches):
    state = observer.init(batches[0].shape[0])
    for batch in batches:
        state = _update(observer, state, batch)
    return state


def _range(observer, state, **grid_args):
    return np.stack(observer.range(state, **grid_args))


@pytest.mark.parametrize("positive", [False, True])
def test_extremes_over_all_batches(positive):
    batches = _batches(positive=positive)
    everything = np.concatenate(batches, axis=1)
    low, high = everything.min(1), everything.max(1)
    for observer in (MinMax(), AbsMax(), Percentile(), MSE()):
        np.testing.assert_array_equal(_state(observer, batches).bounds(), (low, high))
        np.testing.assert_array_equal(observer.exact(jnp.asarray(everything)).bounds(), (low, high))
    np.testing.assert_array_equal(MinMax().range(_state(MinMax(), batches)), (low, high))
    reach = np.abs(everything).max(1)
    expected = (np.zeros(3) if positive else -reach, reach)
    np.testing.assert_array_equal(AbsMax().range(_state(AbsMax(), batches)), expected)


def test_moving_average_by_hand():
    batches = [[[-1.0, 2.0]], [[-3.0, 4.0]], [[1.0, 10.0]]]
    state = _state(MovingAverage(0.75), [np.float32(b) for b in batches])
    low, high = MovingAverage(0.75).range(state, **GRID)
    # Low: -1, then 0.75 * -1 + 0.25 * -3 = -1.5, then 0.75 * -1.5 + 0.25 * 1 = -0.875.
    # High: 2, then 2.5, then 0.75 * 2.5 + 0.25 * 10 = 4.375.
    np.testing.assert_allclose((low, high), ([-0.875], [4.375]), rtol=1e-6)
    whole = MovingAverage(0.75).exact(jnp.array([[-1.0, 2.0]]))
    np.testing.assert_array_equal(whole.bounds(), ([-1.0], [2.0]))


@pytest.mark.parametrize("percentile", [61.7, 98.9, 99.9, 100.0])  # no tie on 2700 values
@pytest.mark.parametrize("positive", [False, True])
def test_percentile_cuts_its_share_of_the_values(percentile, positive):
    batches = _batches(positive=positive)
    everything = np.concatenate(batches, axis=1)
    observer = Percentile(percentile)
    binned = _range(observer, _state(observer, batches), **GRID)
    exact = _range(observer, observer.exact(jnp.asarray(everything)), **GRID)
    for group, values in enumerate(np.sort(everything, axis=1)):
        n = len(values)
        cut = int(np.floor(n * (100 - percentile) / 100 / (1 if positive else 2) + 1e-6))
        low = values[0] if positive else values[cut]
        high = values[n - 1 - cut]
        assert (exact[0][group], exact[1][group]) == (low, high)
        # At most `cut` values lie beyond each end.
        assert (values > exact[1][group]).sum() == cut
        # Half a bin, which near the limit is 1/1024 of it and elsewhere 1/256 of the value.
        width = 2.0 ** (np.floor(np.log2(np.abs(values).max())) + 1) / BINS
        for side, value in zip(binned, (low, high), strict=True):
            assert abs(side[group] - value) <= max(width, abs(value) / 256) / 2


def _squared_errors(values, low, high, bits, symmetric, signed, candidates=100):
    """Error of every candidate range in float64, written with a table of points, not a formula."""
    errors = []
    for ratio in np.arange(candidates, 0, -1) / candidates:
        a, b = min(ratio * low, 0), max(ratio * high, 0)
        if symmetric and signed and bits == 1:
            points = np.array([-1, 1]) * max(-a, b)
        elif symmetric:
            top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
            bottom = -(2 ** (bits - 1)) if signed else 0
            points = np.arange(bottom, top + 1) * max(-a, b) / top
        else:
            step = (b - a) / (2**bits - 1)
            points = (np.arange(2**bits) - np.round(-a / step)) * step
        errors.append(np.square(values[:, None] - points).min(1).sum())
    return np.array(errors)


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
@pytest.mark.parametrize(("symmetric", "signed"), [(True, True), (True, False), (False, False)])
def test_mse_finds_the_best_of_its_candidates(bits, symmetric, signed):
    positive = symmetric and not signed
    batches = _batches(positive=positive)
    everything = np.concatenate(batches, axis=1)
    options = {"bits": bits, "symmetric": symmetric, "signed": signed, "narrow": False}
    observer = MSE()
    exact = _range(observer, observer.exact(jnp.asarray(everything)), **options)
    binned = _range(observer, _state(observer, batches), **options)
    for group, values in enumerate(everything.astype(np.float64)):
        bounds = values.min(), values.max()
        errors = _squared_errors(values, *bounds, bits, symmetric, signed)
        for (low, high), slack in ((exact, 1e-4), (binned, 1e-2)):
            ratio = high[group] / bounds[1]
            # Both ends shrink alike, in hundredths.
            assert low[group] == pytest.approx(ratio * bounds[0], rel=1e-5)
            index = 100 - round(float(ratio) * 100)
            assert ratio == pytest.approx((100 - index) / 100, abs=1e-5)
            assert errors[index] <= errors.min() * (1 + slack)
        if bits < 4:  # it must be able to fail: the heavy tails are worth cutting
            assert errors.min() < 0.9 * errors[0]


def test_mse_keeps_the_whole_range_of_values_that_are_on_the_grid():
    values = jnp.arange(-7, 8, dtype=jnp.float32)[None]
    low, high = MSE().range(MSE().exact(values), **GRID)
    assert (low[0], high[0]) == (-7, 7)


@pytest.mark.parametrize("observer", OBSERVERS, ids=repr)
@pytest.mark.parametrize("constant", [0.0, 3.0, -0.125])
def test_a_constant_is_covered(observer, constant):
    batches = [np.full((3, 900), constant, np.float32)] * 2
    for state in (_state(observer, batches), observer.exact(jnp.asarray(batches[0]))):
        low, high = (np.asarray(v) for v in observer.range(state, **GRID))
        assert np.isfinite([low, high]).all()
        reach = np.maximum(-low, high)
        np.testing.assert_allclose(reach, np.full(3, abs(constant)), rtol=1e-6)


@pytest.mark.parametrize("observer", OBSERVERS, ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("when", [0, 2])
def test_what_is_not_finite_is_never_forgotten(observer, bad, when):
    batches = [b.copy() for b in _batches()]
    batches[when][1, 3] = bad
    finite = np.isfinite(_state(observer, batches).bounds()).all(0)
    np.testing.assert_array_equal(finite, [True, False, True])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MovingAverage(1.0), "momentum=1.0: expected 0 <= momentum < 1"),
        (lambda: MovingAverage(-0.1), "momentum=-0.1"),
        (lambda: Percentile(50), "percentile=50: expected 50 < percentile <= 100"),
        (lambda: Percentile(100.1), "percentile=100.1"),
        (lambda: MSE(candidates=0), "candidates=0: expected at least 1"),
    ],
)
def test_refuses_options_that_mean_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        make()
