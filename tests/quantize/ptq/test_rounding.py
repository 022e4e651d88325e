"""Learned rounding against the formulas of arXiv:2004.10568, element by element in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.quantize import FORMATS, fake_quantize
from kdq.quantize.grid import from_range, to_codes
from kdq.quantize.ptq import rounding


def _h(v):
    return min(max(1.2 / (1 + np.exp(-np.float64(v))) - 0.1, 0.0), 1.0)


def _draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


QUANTIZERS = {
    "channel": from_range(-jnp.full((1, 4), 1.5), jnp.ones((1, 4)), 3),
    "groups": from_range(-jnp.linspace(0.5, 2, 8).reshape(2, 4), jnp.ones((2, 4)), 4),
    "affine": from_range(-jnp.ones((1, 4)), jnp.linspace(1, 2, 4)[None], 2, symmetric=False),
    "narrow": from_range(-1.0, 1.0, 2, narrow=True),
    "sign": from_range(-1.0, 1.0, 1),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_soft_and_hard_weights_are_those_of_the_paper(name):
    quantizer, weight = QUANTIZERS[name], _draw((6, 4))
    below, _ = rounding.start(weight, quantizer)
    v = 3 * _draw((6, 4), seed=1)
    soft, hard = (np.asarray(f(below, v, quantizer)) for f in (rounding.soft, rounding.hard))
    rows = quantizer.scale.shape[0] if quantizer.scale.ndim else 1
    scale, zero = (
        np.broadcast_to(np.repeat(np.atleast_2d(np.float64(a)), 6 // rows, axis=0), (6, 4))
        for a in (quantizer.scale, quantizer.zero_point)
    )
    for i, j in np.ndindex(6, 4):
        s, z, h = scale[i, j], zero[i, j], _h(v[i, j])
        down = np.floor(np.float64(weight[i, j]) / s + z)
        clip = lambda code: np.clip(code, float(quantizer.qmin), float(quantizer.qmax))
        assert soft[i, j] == pytest.approx(s * (clip(down + h) - z), abs=1e-5)
        assert hard[i, j] == pytest.approx(s * (clip(down + (h >= 0.5)) - z), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUANTIZERS, "nf4", "mxfp4"])
def test_it_starts_at_the_float_weight_and_ends_on_the_grid(name):
    weight = _draw((32, 4))
    if name in QUANTIZERS:
        quantizer = QUANTIZERS[name]
    else:
        groups = (1, 4) if FORMATS[name].group_size else (4,)
        quantizer = from_range(-jnp.full(groups, 2.0), jnp.full(groups, 2.0), 4, format=name)
    below, v = rounding.start(weight, quantizer)
    low, high = rounding.neighbours(below, quantizer)
    inside = np.asarray((weight >= low) & (weight <= high))
    assert inside.mean() > 0.2
    soft = np.asarray(rounding.soft(below, v, quantizer))
    np.testing.assert_allclose(soft[inside], np.asarray(weight)[inside], atol=2e-6)
    # What is outside stays at the limit, whatever V says.
    np.testing.assert_array_equal(
        soft[~inside], np.asarray(fake_quantize(weight, quantizer))[~inside]
    )
    hard = rounding.hard(below, 5 * _draw(weight.shape, seed=2), quantizer)
    np.testing.assert_array_equal(fake_quantize(hard, quantizer), hard)
    moved = np.abs(np.asarray(to_codes(hard, quantizer) - to_codes(weight, quantizer)))
    assert moved.max() == 1  # never further than the other neighbour


def test_a_stack_is_its_layers():
    quantizers = [from_range(-a, a, 3) for a in (jnp.ones((1, 4)), 2 * jnp.ones((1, 4)))]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *quantizers)
    weight, v = _draw((2, 6, 4)), 2 * _draw((2, 6, 4), seed=3)
    below, _ = rounding.start(weight, stacked)
    for i, quantizer in enumerate(quantizers):
        own, _ = rounding.start(weight[i], quantizer)
        np.testing.assert_array_equal(below[i], own)
        np.testing.assert_array_equal(
            rounding.hard(below, v, stacked)[i], rounding.hard(own, v[i], quantizer)
        )


def test_regularizer_and_its_exponent():
    v, beta = _draw((5, 3)) * 3, 3.5
    expected = sum(1 - abs(2 * _h(x) - 1) ** beta for x in np.asarray(v).flat)
    assert float(rounding.regularizer(v, beta)) == pytest.approx(expected, rel=1e-5)
    assert float(rounding.regularizer(jnp.asarray([-9.0, 9.0]), beta)) == 0
    # Off for the first fifth, then from 20 to 2 in a straight line.
    found = [tuple(map(float, rounding.annealed_beta(s, 100))) for s in (0, 19, 20, 60, 100)]
    assert found == [(20, 0), (20, 0), (20, 1), (pytest.approx(11), 1), (2, 1)]
    for h in (0.0, 0.3, 1.0):
        assert _h(rounding.inverse(jnp.float32(h))) == pytest.approx(h, abs=1e-6)
