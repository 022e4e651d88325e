"""`fake_quantize` and its gradients against torch's, and by hand where the two are defined apart.

They differ in five ways. Torch rounds before it adds the zero point, so an exact half goes to the
other neighbour if the zero point is odd. It rounds and clips a zero point that trains. Its
learnable variant per tensor takes a negative zero point one too high in the gradients, since it
rounds there by adding 1/2 and cutting off. Its `grad_factor` is any number, and multiplies the zero
point's gradient as well; ours (`gradient_scale`) is 1 / √(elements × qmax), of the scale's gradient
alone. And it has no grid with a zero point of 1/2, which is our one signed bit. Both pass the
gradient where the *rounded* code is on the grid, that is up to half a step beyond its ends.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.quantize import Quantizer, Training, fake_quantize

torch = pytest.importorskip("torch")

SHAPE = (40, 6)
AXIS = 1  # of the channels
GRANULARITIES = {"per_tensor": (), "per_channel": (1, SHAPE[AXIS])}
GRIDS = ("signed", "narrow", "unsigned", "affine", "affine_signed")
BITS = (1, 2, 3, 4, 8)
# Torch has no one-bit grid of signs; with "narrow" one bit has a single code.
CASES = [(bits, kind) for bits in BITS for kind in GRIDS if bits > 1 or "signed" not in kind]
CASES.remove((1, "narrow"))


def _case(bits, kind, granularity, least_zero_point=-128):
    """A tensor inside and beyond the grid, none of it near a tie or a limit, and its grid."""
    rng = np.random.default_rng([bits, GRIDS.index(kind), len(granularity)])
    signed = kind in ("signed", "narrow", "affine_signed")
    qmin = -(2 ** (bits - 1)) + (kind == "narrow") if signed else 0
    qmax = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    shape = GRANULARITIES[granularity]
    scale = np.exp(rng.normal(size=shape)).astype(np.float32)
    zero_point = np.zeros(shape, np.float32)
    if kind.startswith("affine"):
        least = max(qmin, least_zero_point)
        zero_point = rng.integers(least, qmax + 1, size=shape).astype(np.float32)
    beyond = 2 + (qmax - qmin) // 4
    position = rng.integers(qmin - beyond, qmax + beyond + 1, size=SHAPE)
    position = position + rng.uniform(-0.4, 0.4, size=SHAPE)
    codes = np.round(position)
    assert ((codes < qmin) | (codes > qmax)).any()
    assert ((codes >= qmin) & (codes <= qmax)).any()
    x = ((position - zero_point) * scale).astype(np.float32)
    g = rng.normal(size=SHAPE).astype(np.float32)
    return x, g, scale, zero_point, qmin, qmax


@jax.jit
def _ours(x, g, quantizer):
    """Value, and gradients by `x`, the scale and the zero point."""

    def run(x, scale, zero_point):
        return fake_quantize(x, quantizer.replace(scale=scale, zero_point=zero_point))

    y, pull = jax.vjp(run, x, quantizer.scale, quantizer.zero_point)
    return y, *pull(g)


def _quantizer(scale, zero_point, qmin, qmax, **training):
    arrays = (jnp.asarray(v, jnp.float32) for v in (scale, zero_point, qmin, qmax))
    return Quantizer(*arrays, training=Training(**training))


def _torch(name, x, g, scale, zero_point, *rest):
    """Value and the gradients of those of `x`, scale and zero point that torch differentiates."""
    leaves = [torch.tensor(v).requires_grad_(v.dtype == np.float32) for v in (x, scale, zero_point)]
    if "learnable" not in name:
        leaves[1].requires_grad_(False)
    y = getattr(torch, name)(*leaves, *rest)
    y.backward(torch.tensor(g))
    gradients = [leaf.grad.numpy() for leaf in leaves if leaf.grad is not None]
    return y.detach().numpy(), *gradients


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("bits", "kind"), CASES)
def test_value_and_gradient_are_torchs_fake_quantize(bits, kind, granularity):
    x, g, scale, zero_point, qmin, qmax = _case(bits, kind, granularity)
    y, dx, _, _ = _ours(x, g, _quantizer(scale, zero_point, qmin, qmax))
    axis = () if granularity == "per_tensor" else (AXIS,)
    codes = zero_point.astype(np.int32)
    arrays = (scale, codes) if granularity == "per_tensor" else (scale.ravel(), codes.ravel())
    name = f"fake_quantize_{granularity}_affine"
    peer, peer_dx = _torch(name, x, g, *arrays, *axis, qmin, qmax)
    # One product apart in the order of float32 operations.
    np.testing.assert_allclose(y, peer, rtol=1e-6)
    np.testing.assert_array_equal(dx, peer_dx)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("bits", "kind"), CASES)
def test_scale_and_zero_point_train_as_torchs_learnable_variant_does(bits, kind, granularity):
    least = 0 if granularity == "per_tensor" else -128  # below it see the test by hand
    x, g, scale, zero_point, qmin, qmax = _case(bits, kind, granularity, least)
    y, dx, d_scale, d_zero = _ours(x, g, _quantizer(scale, zero_point, qmin, qmax))
    axis = () if granularity == "per_tensor" else (AXIS,)
    name = f"_fake_quantize_learnable_{granularity}_affine"
    arrays = (v.reshape(-1) for v in (scale, zero_point))
    peer = _torch(name, x, g, *arrays, *axis, qmin, qmax, 1.0)
    np.testing.assert_allclose(y, peer[0], rtol=1e-6)
    np.testing.assert_array_equal(dx, peer[1])
    # Sums of float32 terms of either sign, as large as the codes.
    atol = 1e-5 * max(1, qmax - qmin)
    np.testing.assert_allclose(d_scale.reshape(-1), peer[2], rtol=1e-4, atol=atol)
    np.testing.assert_allclose(d_zero.reshape(-1), peer[3], rtol=1e-4, atol=1e-5 * scale.max())
    assert np.abs(peer[2]).max() > 100 * atol
    assert np.abs(peer[3]).max() > 0.1 * scale.min()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradient_scale_is_a_grad_factor_of_the_scale_alone(bits, granularity):
    x, g, scale, zero_point, qmin, qmax = _case(bits, "affine", granularity)
    quantizer = _quantizer(scale, zero_point, qmin, qmax, gradient_scale=True)
    _, dx, d_scale, d_zero = _ours(x, g, quantizer)
    axis = () if granularity == "per_tensor" else (AXIS,)
    name = f"_fake_quantize_learnable_{granularity}_affine"
    arrays = [v.reshape(-1) for v in (scale, zero_point)]
    # LSQ, section 2.2: N the elements of one scale. Torch's modules choose the same number.
    factor = 1 / np.sqrt(x.size / scale.size * qmax)
    peer = _torch(name, x, g, *arrays, *axis, qmin, qmax, factor)
    np.testing.assert_array_equal(dx, peer[1])
    atol = 1e-5 * qmax * factor
    np.testing.assert_allclose(d_scale.reshape(-1), peer[2], rtol=1e-4, atol=atol)
    np.testing.assert_allclose(
        d_zero.reshape(-1) * factor, peer[3], rtol=1e-4, atol=1e-5 * factor * scale.max()
    )


# Where the two are defined apart: both against numbers worked out by hand.

# Positions x / scale of a grid of codes 0 to 7, scale 1/4: halves, and the ends of the grid.
HALVES = np.array([-1.5, -0.5, 0.5, 1.5, 2.5])


@pytest.mark.parametrize(
    ("zero_point", "ours", "torchs"),
    [
        (2, [0, 2, 2, 4, 4], [0, 2, 2, 4, 4]),
        (3, [2, 2, 4, 4, 6], [1, 3, 3, 5, 5]),  # half to even of v + 3, and 3 + half to even of v
    ],
)
def test_halves_of_an_odd_zero_point(zero_point, ours, torchs):
    x, g = (0.25 * HALVES).astype(np.float32), np.ones(5, np.float32)
    grid = np.float32(0.25), np.float32(zero_point), 0, 7
    y, dx, d_scale, _ = _ours(x, g, _quantizer(*grid))
    peer, peer_dx, peer_scale, _ = _torch(
        "_fake_quantize_learnable_per_tensor_affine", x, g, *map(np.atleast_1d, grid[:2]), 0, 7, 1.0
    )
    np.testing.assert_array_equal(y / 0.25 + zero_point, ours)
    np.testing.assert_array_equal(peer / 0.25 + zero_point, torchs)
    np.testing.assert_array_equal(dx, np.ones(5))
    np.testing.assert_array_equal(peer_dx, np.ones(5))
    assert d_scale == sum(ours) - 5 * zero_point - HALVES.sum()
    # Its forward rounds before it adds the zero point and its backward after, as ours does.
    assert peer_scale[0] == sum(ours) - 5 * zero_point - HALVES.sum()


def test_the_gradient_passes_up_to_half_a_step_beyond_the_grid():
    """The mask is of the rounded code in both: 7.4 still passes and rounds to 7, 7.6 does not."""
    position = np.array([-0.6, -0.4, 0.0, 7.0, 7.4, 7.6])
    x, g = (0.25 * position).astype(np.float32), np.arange(1, 7, dtype=np.float32)
    grid = np.float32(0.25), np.float32(0), 0, 7
    y, dx, d_scale, d_zero = _ours(x, g, _quantizer(*grid))
    peer = _torch(
        "_fake_quantize_learnable_per_tensor_affine", x, g, *map(np.atleast_1d, grid[:2]), 0, 7, 1.0
    )
    expected = (
        0.25 * np.array([0, 0, 0, 7, 7, 7]),
        [0, 2, 3, 4, 5, 0],
        1 * 0 + 2 * 0.4 + 3 * 0 + 4 * 0 + 5 * -0.4 + 6 * 7,
        -0.25 * (1 + 6),
    )
    for found, theirs, hand in zip((y, dx, d_scale, d_zero), peer, expected, strict=True):
        np.testing.assert_allclose(found, hand, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(theirs.squeeze(), hand, rtol=1e-5, atol=1e-6)


def test_a_zero_point_that_trains_is_used_as_it_is_and_torch_rounds_it():
    """x / scale = 1.2 and a zero point of 2.6: code round(3.8) = 4, value (4 - 2.6) / 4."""
    x, g = np.array([0.3], np.float32), np.ones(1, np.float32)
    scale, zero_point = np.array([0.25], np.float32), np.array([2.6], np.float32)
    y, _, d_scale, _ = _ours(x, g, _quantizer(scale, zero_point, 0, 7))
    np.testing.assert_allclose((y, d_scale), [[0.35], [0.2]], rtol=1e-5)
    peer, _, peer_scale, _ = _torch(
        "_fake_quantize_learnable_per_tensor_affine", x, g, scale, zero_point, 0, 7, 1.0
    )
    # Torch: zero point 3, code round(1.2) + 3 = 4, value (4 - 3) / 4.
    np.testing.assert_allclose((peer, peer_scale), [[0.25], [-0.2]], rtol=1e-5)


def test_a_negative_zero_point_is_one_too_high_in_torchs_gradients():
    """Codes -4 to 3, zero point -2, positions x / scale of -2.3, 0.7 and 4.8: codes -4, -1, 3."""
    x, g = np.array([-0.575, 0.175, 1.2], np.float32), np.ones(3, np.float32)
    scale, zero_point = np.array([0.25], np.float32), np.array([-2], np.float32)
    grid = scale, zero_point, -4, 3
    y, dx, d_scale, d_zero = _ours(x, g, _quantizer(*grid))
    name = "_fake_quantize_learnable_per_tensor_affine"
    peer, peer_dx, peer_scale, peer_zero = _torch(name, x, g, *grid, 1.0)
    np.testing.assert_allclose(y, [-0.5, 0.25, 1.2 + 0.05], rtol=1e-6)
    np.testing.assert_allclose(peer, y, rtol=1e-6)
    # -2.3 - 2 = -4.3 and 4.8 - 2 = 2.8 round to codes of the grid; with -1, 4.8 - 1 = 3.8 does not.
    np.testing.assert_array_equal(dx, [1, 1, 1])
    np.testing.assert_array_equal(peer_dx, [1, 1, 0])
    # Rounding errors 0.3, 0.3 and 0.2; and 0.3, 0.3 and the clipped 3 - -1.
    np.testing.assert_allclose((d_scale, d_zero), [[0.8], [0]], rtol=1e-5)
    np.testing.assert_allclose((peer_scale, peer_zero), [[4.6], [-0.25]], rtol=1e-5)
