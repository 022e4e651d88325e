"""Integer arithmetic against big integers and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.deploy import arithmetic
from kdq.deploy.contraction import Conv, Dot
from kdq.deploy.qtensor import InputGrid

GRID = InputGrid(jnp.float32(0.03), jnp.int32(13), jnp.int32(255))


def _fixed_point(total: int, mantissa: int, shift: int) -> int:
    """gemmlowp's two steps, in Python's integers."""
    left, right = max(-shift, 0), max(shift, 0)
    limit = (2**31 - 1) >> left
    product = (max(-limit, min(limit, total)) << left) * mantissa
    nudged = product + (2**30 if product >= 0 else 1 - 2**30)
    high = abs(nudged) // 2**31 * (1 if nudged >= 0 else -1)
    mask = (1 << right) - 1
    return (high >> right) + ((high & mask) > (mask >> 1) + (high < 0))


def test_requantizes_by_a_fixed_point_multiplier_as_big_integers_do():
    rng = np.random.default_rng(0)
    total = np.concatenate(
        [
            rng.integers(-(2**31), 2**31 - 1, 3000),
            rng.integers(-5000, 5000, 3000),
            [2**31 - 1, -(2**31), 0, 1, -1],
        ]
    ).astype(np.int32)
    scale = np.exp(rng.uniform(-20, 2, total.size)).astype(np.float32)
    multiplier = scale / np.float32(GRID.scale)
    mantissa, shift = map(np.asarray, jax.jit(arithmetic.fixed_point)(multiplier))
    assert (mantissa >= 2**30).all()
    np.testing.assert_array_equal(mantissa * 2.0 ** (-31.0 - shift), multiplier)
    found = jax.jit(arithmetic.requantize, static_argnames="fixed_point")(
        total, scale, GRID, fixed_point=True
    )
    triples = zip(total.tolist(), mantissa.tolist(), shift.tolist(), strict=True)
    wanted = np.clip([_fixed_point(*one) + 13 for one in triples], 0, 255)
    np.testing.assert_array_equal(found, wanted)
    # It rounds twice, so it is at most one more than the nearest.
    nearest = np.clip(np.round(total * multiplier.astype(np.float64)) + 13, 0, 255)
    assert np.abs(nearest - wanted).max() == 1


def test_requantizes_by_a_float_multiplier_in_float32():
    rng = np.random.default_rng(1)
    total = rng.integers(-(10**5), 10**5, 4096).astype(np.int32)
    scale = np.float32(0.00123)
    steps = np.rint(total.astype(np.float32) * (scale / np.float32(0.03)))
    found = jax.jit(arithmetic.requantize)(total, scale, GRID)
    np.testing.assert_array_equal(found, np.clip(steps + 13, 0, 255))


def test_a_float_of_a_sum_is_rounded_before_anything_is_added():
    rng = np.random.default_rng(2)
    total = rng.integers(-(10**5), 10**5, 4096).astype(np.int32)
    scale, other = np.float32(0.00123), rng.normal(size=4096).astype(np.float32)
    found = jax.jit(lambda t, o: arithmetic.to_float(t, scale) + o)(total, other)
    np.testing.assert_array_equal(found, total.astype(np.float32) * scale + other)


@pytest.mark.parametrize("weight_zero", [0, 5])
def test_a_product_is_that_of_the_differences(weight_zero):
    rng = np.random.default_rng(3)
    x = rng.integers(0, 256, (4, 6)).astype(np.uint8)
    w = rng.integers(-128, 128, (6, 3)).astype(np.int8)
    found = arithmetic.product(
        Dot((((1,), (0,)), ((), ())), rank=2),
        jnp.asarray(x),
        jnp.int32(77),
        jnp.asarray(w),
        w_zero=jnp.int32(weight_zero) if weight_zero else None,
    )
    np.testing.assert_array_equal(found, (x.astype(int) - 77) @ (w.astype(int) - weight_zero))


@pytest.mark.parametrize("weight_zero", [0, 5])
def test_a_convolution_is_padded_with_its_zero_point(weight_zero):
    rng = np.random.default_rng(4)
    x = rng.integers(0, 256, (2, 5, 5, 4)).astype(np.uint8)
    w = rng.integers(-128, 128, (3, 3, 2, 4)).astype(np.int8)
    numbers = jax.lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "HWIO", "NHWC"))
    kernel = Conv((2, 2), ((1, 1), (1, 1)), (1, 1), (1, 1), numbers, 2)
    found = arithmetic.product(
        kernel,
        jnp.asarray(x),
        jnp.int32(77),
        jnp.asarray(w),
        jnp.asarray(w.astype(np.int32).sum((0, 1, 2))),
        jnp.int32(weight_zero) if weight_zero else None,
    )
    centred, weight = x.astype(int) - 77, w.astype(int) - weight_zero
    padded = np.pad(centred, ((0, 0), (1, 1), (1, 1), (0, 0)))
    wanted = np.zeros((2, 3, 3, 4), int)
    for i, j, c in np.ndindex(3, 3, 4):
        window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, c // 2 * 2 : c // 2 * 2 + 2]
        wanted[:, i, j, c] = (window * weight[..., c]).sum((1, 2, 3))
    np.testing.assert_array_equal(found, wanted)


def test_multipliers_and_codes_are_those_of_numpy():
    """XLA would divide one factor by the scale, or multiply by the reciprocal of it."""
    rng = np.random.default_rng(4)
    scales = rng.uniform(0.001, 0.01, 4096).astype(np.float32)
    own, other = np.float32(0.0078912), np.float32(0.0312345)
    compiled = jax.jit(lambda a, b, c: arithmetic.divide(arithmetic.exactly(a * b), c))
    expected = (own * scales) / other
    np.testing.assert_array_equal(compiled(own, scales, other), expected)
    assert (jax.jit(lambda a, b, c: a * b / c)(own, scales, other) != expected).any()
    # Halves of steps, where the last bit decides.
    x = (rng.integers(-100, 100, 10**5) + 0.5).astype(np.float32) * own
    grid = InputGrid(jnp.float32(own), jnp.int32(128), jnp.int32(255))
    codes = np.clip(np.round(x / own) + 128, 0, 255)
    np.testing.assert_array_equal(jax.jit(arithmetic.quantize)(x, grid), codes)
