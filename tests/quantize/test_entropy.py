"""The entropy observer against a brute-force float64 search over every candidate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdq.quantize import Entropy, MinMax, QuantizationRule, TensorSpec, calibrate, grid
from kdq.quantize.histogram import BINS

SIGNED = {"symmetric": True, "signed": True, "narrow": False}
UNSIGNED = {"symmetric": True, "signed": False, "narrow": False}
AFFINE = {"symmetric": False, "signed": False, "narrow": False}


_update = functools.partial(jax.jit, static_argnums=0)(lambda o, state, x: o.update(state, x))


def _batches(seed=0, positive=False):
    """Two batches [groups, elements]: heavy tails, and a body with a few far values."""
    rng = np.random.default_rng(seed)
    body = rng.normal(size=(2, 3000))
    body[0] = 0.01 * rng.standard_t(3, size=3000)
    body[1, ::500] *= 30
    batches = [np.float32(f * body[:, i::2]) for i, f in enumerate((1.0, 2.0))]
    return [np.abs(b) for b in batches] if positive else batches


def _state(observer, batches):
    state = observer.init(len(batches[0]))
    for batch in batches:
        state = _update(observer, state, jnp.asarray(batch))
    return state


def _points(low, high, bits, symmetric, signed, narrow):
    """The numbers of a grid, and the ends beyond which it clips."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric and signed and bits == 1:
        reach = max(-low, high)
        return [-reach, reach], (-2 * reach, 2 * reach)
    if symmetric:
        top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        bottom = -(2 ** (bits - 1)) if signed else 0
        step, zero = max(-low, high) / top, 0
    else:
        bottom, top = 0, 2**bits - 1
        step = (high - low) / top
        zero = round(-low / step)
    points = [(code - zero) * step for code in range(bottom, top + 1)]
    return points, (points[0] - step / 2, points[-1] + step / 2)


def _divergences(values, low, high, bits, candidates, **options):
    """KL(P || Q) of each candidate, from the slides' description; loops over bins."""
    limit = 2.0 ** (np.floor(np.log2(np.abs(values).max())) + 1)
    edges = np.linspace(-limit, limit, 2 * BINS + 1)
    counts = np.histogram(values, bins=edges)[0]
    counts[BINS] = counts[BINS + 1]  # the bin from 0 on
    centres = np.clip((edges[1:] + edges[:-1]) / 2, low, high)
    found = []
    for candidate in range(candidates, 0, -1):
        ratio = candidate / candidates
        points, (left, right) = _points(ratio * low, ratio * high, bits, **options)
        inside = [i for i, c in enumerate(centres) if left <= c <= right]
        if not counts[inside].any():
            found.append(np.inf)
            continue
        full = [i for i in inside if counts[i]]
        first, last = full[0], full[-1]
        reference = {i: float(counts[i]) for i in inside}
        reference[first] += counts[:first].sum()
        reference[last] += counts[last + 1 :].sum()
        nearest = np.abs(centres[inside][:, None] - np.array(points)).argmin(1)
        rounded = {}
        by_code = {}
        for i, code in zip(inside, nearest.tolist(), strict=True):
            by_code.setdefault(code, []).append(i)
        for bins in by_code.values():
            full = [i for i in bins if reference[i] > 0]
            for i in full:
                rounded[i] = sum(float(counts[j]) for j in bins) / len(full)
        total_p, total_q = sum(reference.values()), sum(rounded.values())
        divergence = 0.0
        for i, p in reference.items():
            if p > 0:
                q = rounded[i] / total_q if total_q else 0.0
                divergence += p / total_p * np.log(p / total_p / q) if q else np.inf
        found.append(divergence)
    return np.array(found)


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        *((4, SIGNED), (6, UNSIGNED)),
        *(pytest.param(bits, SIGNED, marks=pytest.mark.slow) for bits in (1, 2, 8)),
        (5, AFFINE),
    ],
)
def test_finds_the_best_of_its_candidates(bits, options):
    batches = _batches(positive=options is UNSIGNED)
    everything = np.concatenate(batches, axis=1).astype(np.float64)
    observer = Entropy(candidates=25)
    binned = observer.range(_state(observer, batches), bits=bits, **options)
    whole = observer.range(observer.exact(jnp.float32(everything)), bits=bits, **options)
    cut = []
    for group, values in enumerate(everything):
        bounds = values.min(), values.max()
        divergences = _divergences(values, *bounds, bits, 25, **options)
        for low, high in (binned, whole):
            ratio = float(high[group]) / bounds[1]
            assert float(low[group]) == pytest.approx(ratio * bounds[0], rel=1e-5)
            index = 25 - round(ratio * 25)
            assert ratio == pytest.approx((25 - index) / 25, abs=1e-5)
            assert divergences[index] <= divergences.min() * (1 + 1e-3) + 1e-6
        cut.append(divergences.min() < 0.9 * divergences[0])
    assert any(cut)  # it must be able to fail


def test_clips_the_outliers_and_not_a_uniform_body():
    rng = np.random.default_rng(0)
    body = rng.uniform(-1, 1, size=20000)
    observer = Entropy()
    for outliers, lowest, highest in (([], 0.97, 1.0), ([40.0, -40.0], 1.0, 4.0)):
        values = jnp.float32(np.append(body, outliers))[None]
        _, high = observer.range(observer.exact(values), bits=8, **SIGNED)
        assert lowest <= float(high[0]) <= highest


@pytest.mark.slow
def test_groups_of_any_number_and_a_format():
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.standard_t(3, size=(19, 500)), jnp.float32)
    observer = Entropy(candidates=10)
    low, high = observer.range(observer.exact(values), bits=4, format="fp8_e4m3")
    some = np.array([0, 15, 16, 18])
    alone = [
        observer.range(observer.exact(values[i : i + 1]), bits=4, format="fp8_e4m3") for i in some
    ]
    expected = [np.concatenate(side) for side in zip(*alone, strict=True)]
    np.testing.assert_array_equal((low[some], high[some]), expected)
    assert (np.asarray(high) <= np.asarray(values).max(1)).all()


SLOW = pytest.mark.slow


@pytest.mark.parametrize("constant", [0.0, *(pytest.param(c, marks=SLOW) for c in (3.0, -0.125))])
@pytest.mark.parametrize("options", [SIGNED, UNSIGNED, AFFINE])
def test_a_constant_is_covered(constant, options):
    observer = Entropy()
    batches = [np.full((2, 50), constant, np.float32)] * 2
    for state in (_state(observer, batches), observer.exact(jnp.asarray(batches[0]))):
        low, high = observer.range(state, bits=4, **options)
        np.testing.assert_array_equal(np.minimum(low, 0), np.full(2, min(constant, 0)))
        np.testing.assert_array_equal(np.maximum(high, 0), np.full(2, max(constant, 0)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_with_the_layer(bad):
    variables = {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    spec = TensorSpec(bits=4, observer=Entropy())
    x = jnp.ones((4, 3)).at[1, 1].set(bad)
    rules = (QuantizationRule(path=".*", activations=spec),)
    with pytest.raises(ValueError, match="NaN or infinity in the input of layer ''"):
        calibrate(nn.Dense(2), variables, rules, [x])
    with pytest.raises(ValueError, match="candidates=0: expected at least 1"):
        Entropy(candidates=0)


def test_it_beats_the_whole_range_where_few_codes_meet_a_long_tail():
    rng = np.random.default_rng(3)
    values = jnp.asarray(np.maximum(rng.standard_t(4, size=(1, 20000)), 0), jnp.float32)
    errors = []
    for observer in (MinMax(), Entropy()):
        low, high = observer.range(_state(observer, [values]), bits=4, **UNSIGNED)
        quantizer = grid.from_range(low[0], high[0], 4, **UNSIGNED)
        rounded = grid.from_codes(grid.to_codes(values, quantizer), quantizer)
        errors.append(float(jnp.square(values - rounded).mean()))
    assert errors[1] < 0.5 * errors[0]
