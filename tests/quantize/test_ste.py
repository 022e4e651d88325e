"""`fake_quantize` and its gradients against float64 closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdq.quantize import Quantizer, fake_quantize, grid

SHAPE = (12, 5)
SCALE_SHAPES = {"per_tensor": (), "per_channel": (1, 5), "per_group": (3, 5)}
GRIDS = ("signed", "narrow", "unsigned", "affine", "affine_signed")


def _limits(kind, bits):
    if kind in ("unsigned", "affine"):
        return 0, 2**bits - 1
    if bits == 1:
        return 0, 1
    return -(2 ** (bits - 1)) + (kind == "narrow"), 2 ** (bits - 1) - 1


def _case(kind, bits, granularity, dtype=np.float32):
    """A tensor with positions inside and beyond the grid, none of them near a tie."""
    rng = np.random.default_rng([bits, GRIDS.index(kind), len(granularity)])
    qmin, qmax = _limits(kind, bits)
    shape = SCALE_SHAPES[granularity]
    scale = np.exp(rng.normal(size=shape)).astype(np.float32)
    if kind.startswith("affine"):
        zero_point = rng.integers(qmin, qmax + 1, size=shape).astype(np.float32)
    else:
        is_sign = bits == 1 and kind != "unsigned"
        zero_point = np.full(shape, 0.5 if is_sign else 0.0, np.float32)
    beyond = 3 + (qmax - qmin) // 4
    v = rng.integers(qmin - beyond, qmax + beyond, size=SHAPE) + rng.uniform(-0.4, 0.4, size=SHAPE)
    x = ((v - _wide(zero_point)) * _wide(scale)).astype(dtype)
    return x, {"scale": scale, "zero_point": zero_point, "qmin": qmin, "qmax": qmax}


def _wide(parameter):
    """A parameter for every element, in float64."""
    parameter = np.asarray(parameter, np.float64)
    if parameter.ndim and parameter.shape[0] > 1:
        parameter = np.repeat(parameter, SHAPE[0] // parameter.shape[0], axis=0)
    return np.broadcast_to(parameter, SHAPE)


def _narrowed(wide, shape):
    """The sum over the elements of each scale."""
    if not shape:
        return wide.sum()
    return wide.reshape(shape[0], -1, SHAPE[1]).sum(1)


def _oracle(x, scale, zero_point, qmin, qmax):
    """Value, position and code of every element; np.round is to nearest, ties to even."""
    scale, zero_point = _wide(scale), _wide(zero_point)
    v = np.asarray(x, np.float64) / scale + zero_point
    q = np.clip(np.round(v), qmin, qmax)
    return (q - zero_point) * scale, v, q


@jax.jit
def _value_and_gradients(x, quantizer, g):
    def run(x, scale, zero_point):
        return fake_quantize(x, quantizer.replace(scale=scale, zero_point=zero_point))

    y, pull = jax.vjp(run, x, quantizer.scale, quantizer.zero_point)
    return y, *pull(g)


def _as_jax(quantizer):
    return Quantizer(**{k: jnp.asarray(v, jnp.float32) for k, v in quantizer.items()})


@pytest.mark.parametrize("granularity", SCALE_SHAPES)
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_value_and_gradients_in_closed_form(bits, kind, granularity):
    x, quantizer = _case(kind, bits, granularity)
    g = np.random.default_rng(7).normal(size=SHAPE).astype(np.float32)
    y, dx, d_scale, d_zero = _value_and_gradients(jnp.asarray(x), _as_jax(quantizer), g)

    expected, v, q = _oracle(x, **quantizer)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    inside = (np.round(v) >= quantizer["qmin"]) & (np.round(v) <= quantizer["qmax"])
    assert inside.any()
    assert (~inside).any()
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))
    shape = SCALE_SHAPES[granularity]
    each = np.where(inside, q - v, q - _wide(quantizer["zero_point"]))
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, np.abs(each).max())}
    np.testing.assert_allclose(d_scale, _narrowed(g * each, shape), **tolerance)
    each = np.where(inside, 0, -_wide(quantizer["scale"]))
    np.testing.assert_allclose(d_zero, _narrowed(g * each, shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", SCALE_SHAPES)
@pytest.mark.parametrize("kind", GRIDS)
def test_scale_gradient_is_the_slope_of_the_value_where_nothing_rounds(kind, granularity):
    """Outside the grid the value is (limit - zero_point) * scale: linear, so finite steps agree."""
    x, quantizer = _case(kind, 3, granularity)
    _, v, _ = _oracle(x, **quantizer)
    outside = (np.round(v) < quantizer["qmin"]) | (np.round(v) > quantizer["qmax"])
    g = outside.astype(np.float32)
    _, _, d_scale, _ = _value_and_gradients(jnp.asarray(x), _as_jax(quantizer), g)
    # A step so small that no element crosses the edge of the grid.
    step = 1e-3
    ends = [
        _oracle(x, **{**quantizer, "scale": quantizer["scale"] * (1 + s)})[0] for s in (step, -step)
    ]
    slope = g * (ends[0] - ends[1]) / (2 * step * _wide(quantizer["scale"]))
    expected = _narrowed(slope, SCALE_SHAPES[granularity])
    np.testing.assert_allclose(d_scale, expected, rtol=1e-4, atol=1e-4)


def test_ties_go_to_even_and_the_mask_follows_the_rounded_code():
    x = jnp.array([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.49, 3.5]) * 0.25
    quantizer = _as_jax({"scale": 0.25, "zero_point": 0, "qmin": -3, "qmax": 3})
    y, pull = jax.vjp(lambda x: fake_quantize(x, quantizer), x)
    np.testing.assert_array_equal(y / 0.25, [-3, -2, -2, 0, 0, 2, 2, 3, 3])
    np.testing.assert_array_equal(pull(jnp.ones(9))[0], [0, 1, 1, 1, 1, 1, 1, 1, 0])


@pytest.mark.parametrize("granularity", SCALE_SHAPES)
@pytest.mark.parametrize("kind", GRIDS)
def test_bfloat16_is_rounded_in_float32(kind, granularity):
    x, quantizer = _case(kind, 8, granularity, dtype=jnp.bfloat16)
    _, v, q = _oracle(x, **quantizer)
    # bfloat16 moves positions, some of them to within float32's rounding of a tie.
    clear = np.abs(np.abs(v - np.floor(v)) - 0.5) > 1e-3
    assert clear.mean() > 0.9
    x = np.where(clear, x, np.zeros_like(x))
    expected, v, q = _oracle(x, **quantizer)
    g = np.random.default_rng(7).normal(size=SHAPE).astype(jnp.bfloat16)
    y, dx, d_scale, _ = _value_and_gradients(jnp.asarray(x), _as_jax(quantizer), g)
    assert (y.dtype, dx.dtype, d_scale.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(y, expected.astype(np.float32).astype(jnp.bfloat16))
    inside = (np.round(v) >= quantizer["qmin"]) & (np.round(v) <= quantizer["qmax"])
    np.testing.assert_array_equal(dx, np.where(inside, g, np.zeros_like(g)))
    each = g.astype(np.float64) * np.where(inside, q - v, q - _wide(quantizer["zero_point"]))
    expected = _narrowed(each, SCALE_SHAPES[granularity])
    np.testing.assert_allclose(d_scale, expected, rtol=1e-4, atol=1e-2)


_jitted = jax.jit(fake_quantize)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    x=st.lists(st.floats(-1000, 1000, width=32), min_size=16, max_size=16),
    scale=st.floats(2**-10, 16, width=32),
    bits=st.integers(1, 8),
    kind=st.sampled_from(GRIDS),
    share=st.floats(0, 1),
)
def test_outputs_lie_on_the_grid_nearest_to_the_input_and_stay_there(x, scale, bits, kind, share):
    qmin, qmax = _limits(kind, bits)
    zero_point = round(qmin + share * (qmax - qmin)) if kind.startswith("affine") else 0
    if bits == 1 and kind in ("signed", "narrow"):
        zero_point = 0.5
    x = np.array(x, np.float32)
    quantizer = _as_jax({"scale": scale, "zero_point": zero_point, "qmin": qmin, "qmax": qmax})
    y = np.asarray(_jitted(x, quantizer))
    points = ((np.arange(qmin, qmax + 1) - zero_point) * scale).astype(np.float32)
    assert np.isin(y, points).all()
    nearest = np.abs(x[:, None].astype(np.float64) - points).min(-1)
    assert (np.abs(x.astype(np.float64) - y) <= nearest + 1e-4 * scale).all()
    np.testing.assert_array_equal(_jitted(y, quantizer), y)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", SCALE_SHAPES)
@pytest.mark.parametrize("kind", GRIDS)
def test_codes_that_are_exported_stand_for_the_values_that_were_trained(kind, granularity):
    """Bit for bit, at exact ties too, which a quotient and a product round differently."""
    shape = SCALE_SHAPES[granularity]
    rng = np.random.default_rng(3)
    qmin, qmax = _limits(kind, 4)
    zero_point = np.full(shape, 5.0 if kind == "affine" else 0.0, np.float32)
    for _ in range(20):
        scale = rng.uniform(0.001, 1, size=shape).astype(np.float32)
        ties = rng.integers(qmin - 2, qmax + 2, size=SHAPE) + 0.5
        x = jnp.asarray((ties - _wide(zero_point)) * _wide(scale), jnp.float32)
        quantizer = _as_jax({"scale": scale, "zero_point": zero_point, "qmin": qmin, "qmax": qmax})
        codes = grid.to_codes(x, quantizer)
        assert set(np.unique(codes)) <= set(range(qmin, qmax + 1))
        np.testing.assert_array_equal(
            grid.from_codes(codes, quantizer), fake_quantize(x, quantizer)
        )
