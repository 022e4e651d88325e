"""Integer grids against tables, float64 formulas and loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.quantize import grid

BITS = range(1, 9)


@pytest.mark.parametrize("bits", BITS)
def test_limits_are_those_of_twos_complement_even_when_traced(bits):
    codes = [0, 1] if bits == 1 else [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]
    narrow = [0, 1] if bits == 1 else [codes[0] + 1, codes[1]]
    for traced in (False, True):
        limits = jax.jit(grid.limits, static_argnames=("signed", "narrow"))
        given = jnp.float32(bits) if traced else bits
        run = limits if traced else grid.limits
        assert [float(v) for v in run(given, signed=True)] == codes
        assert [float(v) for v in run(given, signed=True, narrow=True)] == narrow
        assert [float(v) for v in run(given, signed=False)] == [0, 2**bits - 1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("signed", "narrow"), [(True, False), (True, True), (False, False)])
def test_symmetric_grid_reaches_the_largest_magnitude(bits, signed, narrow):
    low = np.array([-3.0, -0.5, 0.0]) if signed else np.zeros(3)
    high = np.array([1.0, 2.0, 0.7])
    quantizer = grid.from_range(low, high, bits, signed=signed, narrow=narrow)
    reach = np.maximum(-low, high)
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    is_sign = signed and bits == 1
    np.testing.assert_allclose(quantizer.scale, 2 * reach if is_sign else reach / top, rtol=1e-6)
    np.testing.assert_array_equal(quantizer.zero_point, np.full(3, 0.5 if is_sign else 0.0))
    # Whatever the formula: the outermost code is the end of the range.
    outermost = grid.from_codes(jnp.full(3, quantizer.qmax), quantizer)
    np.testing.assert_allclose(outermost, reach, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
def test_affine_grid_spans_the_range_and_holds_zero(bits, signed):
    low, high = np.array([-1.0, -3.0, 0.5, -4.0]), np.array([3.0, 0.25, 2.0, -1.0])
    quantizer = grid.from_range(low, high, bits, symmetric=False, signed=signed)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / (2**bits - 1)
    qmin = -(2 ** (bits - 1)) if signed and bits > 1 else 0
    np.testing.assert_allclose(quantizer.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(quantizer.zero_point, np.round(qmin - low / scale))
    assert quantizer.qmax - quantizer.qmin == 2**bits - 1
    zeros = grid.from_codes(grid.to_codes(jnp.zeros(4), quantizer), quantizer)
    np.testing.assert_array_equal(zeros, np.zeros(4))
    ends = [
        grid.from_codes(jnp.full(4, getattr(quantizer, k)), quantizer) for k in ("qmin", "qmax")
    ]
    # The integer zero point moves both ends by less than half a step.
    assert (np.abs(ends - np.stack([low, high])) <= 0.501 * scale).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "options",
    [{}, {"narrow": True}, {"signed": False}, {"symmetric": False, "signed": False}],
    ids=str,
)
def test_empty_range_keeps_zeros_zero(bits, options):
    quantizer = grid.from_range(jnp.array([0.0, -1.0]), jnp.array([0.0, 1.0]), bits, **options)
    assert quantizer.scale[0] == 1.0
    values = grid.from_codes(grid.to_codes(jnp.zeros((3, 2)), quantizer), quantizer)
    np.testing.assert_array_equal(values[:, 0], np.zeros(3))


def test_scale_too_small_to_invert_is_an_empty_range():
    quantizer = grid.from_range(jnp.zeros(1), jnp.full(1, 1e-37), 8)
    assert quantizer.scale[0] == 1.0
    assert np.isfinite(1.0 / grid.from_range(0.0, 1e-34, 8).scale)


SCALE_SHAPES = [
    ((6, 4), ()),
    ((6, 4), (4,)),
    ((6, 4), (1, 4)),
    ((6, 4), (3, 4)),
    ((6, 4), (3, 2)),
    ((2, 3, 6, 4), (1, 1, 2, 4)),
    ((2, 3, 6, 4), (4,)),
]


@pytest.mark.parametrize(("shape", "scale_shape"), SCALE_SHAPES)
def test_expand_groups_and_reduce_agree_with_a_loop(shape, scale_shape):
    rng = np.random.default_rng(0)
    x, scale = rng.integers(-9, 9, size=shape), rng.integers(1, 99, size=scale_shape)
    padded = (1,) * (len(shape) - len(scale_shape)) + scale_shape
    wide, members = np.zeros(shape), {}
    for index in itertools.product(*map(range, shape)):
        owner = tuple(i * s // d for i, s, d in zip(index, padded, shape, strict=True))
        wide[index] = scale.reshape(padded)[owner]
        members.setdefault(owner, []).append(x[index])
    expanded = grid.expand(jnp.asarray(scale), shape)
    np.testing.assert_array_equal(np.broadcast_to(expanded, shape), wide)
    sums = np.array([sum(members[o]) for o in sorted(members)]).reshape(scale_shape)
    np.testing.assert_array_equal(grid.reduce_to(jnp.asarray(x, jnp.float32), scale_shape), sums)
    groups = np.asarray(grid.to_groups(jnp.asarray(x), scale_shape))
    assert [sorted(row) for row in groups] == [sorted(members[o]) for o in sorted(members)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_bits_of_a_quantizer(signed, bits):
    for symmetric in (True, False):
        options = {"symmetric": symmetric, "signed": signed}
        assert grid.bits(grid.from_range(-1.0, 1.0, bits, **options)) == bits


def test_points_are_all_numbers_of_a_grid_in_order():
    affine = grid.from_range(-0.6, 1.0, 2, symmetric=False, signed=False)
    step = 1.6 / 3
    np.testing.assert_allclose(grid.points(affine), [-step, 0, step, 2 * step], rtol=1e-6)
    np.testing.assert_allclose(grid.points(grid.from_range(-3.0, 2.0, 1)), [-3, 3])
    of_format = grid.points(grid.from_range(-1.0, 1.0, 4, format="nf4"))
    assert len(of_format) == 16
    assert float(of_format[0]) == -1.0
    per_channel = grid.from_range(-jnp.ones((1, 2)), jnp.ones((1, 2)), 4)
    with pytest.raises(ValueError, match=r"one scale, got \(1, 2\)"):
        grid.points(per_channel)
