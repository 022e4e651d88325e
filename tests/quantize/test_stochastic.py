"""Rounding by chance: its mean, its gradient, where it draws from, and where it does not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import quantize
from kdq.quantize import Quantizer, choice, fake_quantize, grid
from kdq.quantize.formats import E2M1
from kdq.quantize.qat import BY_CHANCE

DRAWS = 4000
GRIDS = {
    "signed": {"scale": 0.5, "zero_point": 0, "qmin": -4, "qmax": 3},
    "affine": {"scale": 0.25, "zero_point": 5, "qmin": 0, "qmax": 15},
    "sign": {"scale": 3.0, "zero_point": 0.5, "qmin": 0, "qmax": 1},
    "fp4": {"scale": 0.5, "zero_point": 0, "qmin": 0, "qmax": len(E2M1) - 1, "levels": E2M1},
}


def _quantizer(kind):
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in GRIDS[kind].items()}
    return Quantizer(**arrays, training=BY_CHANCE)


def _points(kind):
    """The numbers that the codes stand for, ascending, float64."""
    fields = GRIDS[kind]
    if "levels" in fields:
        return fields["scale"] * np.array(fields["levels"], np.float64)
    return fields["scale"] * (np.arange(fields["qmin"], fields["qmax"] + 1) - fields["zero_point"])


@jax.jit
def _rounded(x, quantizer, keys):
    return jax.vmap(lambda key: fake_quantize(x, quantizer.replace(key=key)))(keys)


@pytest.mark.parametrize("kind", GRIDS)
def test_goes_to_either_neighbour_with_the_probability_of_its_share(kind):
    points = _points(kind)
    rng = np.random.default_rng(0)
    inside = rng.uniform(points[0], points[-1], size=60)
    x = np.concatenate([inside, points, [points[0] - 0.1, points[-1] + 0.1]]).astype(np.float32)
    found = np.asarray(_rounded(x, _quantizer(kind), jax.random.split(jax.random.key(3), DRAWS)))
    for i, value in enumerate(np.clip(x.astype(np.float64), points[0], points[-1])):
        above = min(np.searchsorted(points, value), len(points) - 1)
        lower, upper = points[max(above - 1, 0)], points[above]
        if i >= len(inside):  # a point of the grid, or clipped to its end: no chance
            np.testing.assert_array_equal(found[:, i], np.float32(value))
            continue
        assert set(np.unique(found[:, i])) <= {np.float32(lower), np.float32(upper)}
        share = (value - lower) / (upper - lower)
        # Five standard deviations of a binomial: 1 in 10⁶ of so many elements, and keys are fixed.
        bound = 5 * np.sqrt(share * (1 - share) / DRAWS) + 5 / DRAWS
        assert abs((found[:, i] == np.float32(upper)).mean() - share) < bound
        assert abs(found[:, i].mean() - value) < bound * (upper - lower) + 1e-5


@pytest.mark.parametrize("kind", GRIDS)
def test_the_gradient_is_straight_through_whatever_was_drawn(kind):
    points = _points(kind)
    step = points[1] - points[0]
    x = np.linspace(points[0] - 2 * step, points[-1] + 2 * step, 41).astype(np.float32)
    g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    quantizer = _quantizer(kind)

    def run(x, scale, quantizer):
        return fake_quantize(x, quantizer.replace(scale=scale))

    def pull(key):
        own = quantizer.replace(key=key)
        y, back = jax.vjp(lambda x, scale: run(x, scale, own), x, quantizer.scale)
        return y, *back(g)

    y, dx, d_scale = jax.jit(pull)(jax.random.key(0))
    nearest, nearest_dx, _ = jax.jit(pull)(None)
    assert (y != nearest).any()
    np.testing.assert_array_equal(dx, nearest_dx)
    half = 0 if kind == "fp4" else 0.5 * step
    passes = (x >= points[0] - half - 1e-6) & (x <= points[-1] + half + 1e-6)
    clear = np.minimum(np.abs(x - points[0] + half), np.abs(x - points[-1] - half)) > 1e-4
    np.testing.assert_array_equal(dx[clear], np.where(passes, g, 0)[clear])
    each = np.where(np.asarray(dx) == g, np.asarray(y, np.float64) - x, y)
    np.testing.assert_allclose(d_scale, (g * each).sum() / float(quantizer.scale), rtol=1e-4)


def test_large_codes_that_are_whole_stay():
    """floor(127 + u) in float32 would be 128 for some u."""
    x = jnp.full(200_000, 127.0)
    quantizer = Quantizer(*map(jnp.float32, (1, 0, -1000, 1000)), key=jax.random.key(0))
    np.testing.assert_array_equal(grid.to_codes(x, quantizer), x)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 8)])
def test_a_share_finer_than_an_elements_own_bits_counts(shape):
    """1 of 1024, with 8 bits a number: without what the numbers share it would be 0 or 4."""
    x = jnp.full(shape, 1 / 1024)
    draw = jax.jit(jax.vmap(lambda key: choice.by_chance(x, None, key)))
    found = np.asarray(draw(jax.random.split(jax.random.key(1), 2**18)))
    expected = 2**18 / 1024
    assert np.abs(found.sum(0) - expected).max() < 5 * np.sqrt(expected)


def test_numbers_of_one_draw_are_uniform_and_go_their_own_ways():
    share = np.random.default_rng(0).random((400, 501), np.float32)
    up = np.asarray(choice.by_chance(jnp.asarray(share), None, jax.random.key(2)))
    for low in np.arange(0, 1, 0.125):  # wherever they lie between two levels
        here = (share >= low) & (share < low + 0.125)
        bound = 5 * np.sqrt(0.25 / here.sum())
        assert abs(up[here].mean() - share[here].mean()) < bound
    error = up - share
    for lag in (1, 2, 3, 4):  # neighbours, of which some come from one word
        pairs = np.corrcoef(error[:, lag:].ravel(), error[:, :-lag].ravel())[0, 1]
        assert abs(pairs) < 5 / np.sqrt(up.size)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x, nn.Dense(4, name="dense")(x)


class Layers(nn.Module):
    """Two times a scan over three layers; all get the same input."""

    @nn.compact
    def __call__(self, x, train=False):
        stack = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        members = nn.vmap(
            stack,
            in_axes=None,
            out_axes=0,
            axis_size=2,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        _, y = members(name="layers")(x, None)
        return y


@pytest.fixture(scope="module")
def stacked():
    """Variables of equal layers, and quantizers that round by chance."""
    x = jax.random.uniform(jax.random.key(1), (5, 8))
    kernel = jax.random.normal(jax.random.key(2), (8, 4))
    of_stack = lambda tree: jax.tree.map(lambda a: jnp.broadcast_to(a, (2, 3, *a.shape)), tree)
    variables = of_stack({"params": {"layers": {"dense": {"kernel": kernel, "bias": jnp.ones(4)}}}})
    reach = jnp.full((1, 4), 2.0)
    calibrated = {
        "weights": of_stack(grid.from_range(-reach, reach, 3)),
        "activations": of_stack(grid.from_range(0.0, 1.0, 3, signed=False)),
    }
    return x, *quantize.prepare(variables, {"layers/dense": calibrated}, "stochastic")


@pytest.mark.slow
@pytest.mark.parametrize("halves", [("weights",), ("weights", "activations")])
def test_each_layer_of_a_stack_draws_its_own(stacked, halves):
    x, variables, qparams = stacked
    own = {"layers/dense": {k: qparams["layers/dense"][k] for k in halves}}

    @jax.jit
    def run(seed):
        keyed = quantize.with_keys(own, jax.random.key(seed))
        out = lambda p: quantize.apply(Layers(), {"params": p}, keyed, x)
        if halves == ("weights",):
            return out(variables["params"]), None
        (_, y), gradient = jax.value_and_grad(lambda p: (jnp.sum(out(p)), out(p)), has_aux=True)(
            variables["params"]
        )
        return y, gradient["layers"]["dense"]["kernel"]

    (first, gradient), (again, _), (other, _) = run(0), run(0), run(1)
    layers = np.asarray(first).reshape(6, -1)
    assert layers.shape[1] == 20
    assert len({row.tobytes() for row in layers}) == 6
    np.testing.assert_array_equal(first, again)
    assert not (np.asarray(first) == np.asarray(other)).all(axis=(2, 3)).any()
    if "activations" in halves:  # `nn.remat` computes them again, with the same numbers
        by_hand = quantize.with_keys(own, jax.random.key(0))["layers/dense"]["activations"]
        for i, j in np.ndindex(2, 3):
            one = jax.tree.map(lambda a, i=i, j=j: a[i, j], by_hand)
            expected = np.broadcast_to(fake_quantize(x, one).sum(0)[:, None], (8, 4))
            np.testing.assert_allclose(gradient[i, j], expected, rtol=1e-5)


def test_keys_are_of_a_step_and_of_stochastic_quantizers_alone(stacked):
    x, variables, qparams = stacked
    plain = quantize.plain(qparams)
    for method in ("ste", "lsq"):
        _, prepared = quantize.prepare(variables, plain, method)
        keyed = quantize.with_keys(prepared, jax.random.key(0))
        assert jax.tree.structure(keyed) == jax.tree.structure(prepared)
    keyed = quantize.with_keys(qparams, jax.random.key(0))
    assert keyed["layers/dense"]["weights"].key.shape == (2, 3)
    # A calibrated network, one that is evaluated and one that is finished round to the nearest.
    finished = quantize.finish(variables, keyed)
    assert jax.tree.structure(finished[1]) == jax.tree.structure(plain)
    nearest, prepared, after = (
        quantize.predict(Layers(), *of, x)
        for of in ((variables, plain), (variables, qparams), finished)
    )
    np.testing.assert_array_equal(prepared, nearest)
    np.testing.assert_array_equal(after, nearest)


def test_no_two_quantizers_share_a_key():
    one = grid.from_range(-1.0, 1.0, 4).replace(training=BY_CHANCE)
    qparams = {path: {"weights": one, "activations": one} for path in ("a", "b", "c/d")}
    keyed = quantize.with_keys(qparams, jax.random.key(5))
    keys = [jax.random.key_data(q.key) for of in keyed.values() for q in of.values()]
    assert len({np.asarray(key).tobytes() for key in keys}) == 6
    # Whatever the order of the layers, which a pytree does not keep.
    turned = quantize.with_keys(dict(reversed(qparams.items())), jax.random.key(5))
    assert all(turned[p][n].key == keyed[p][n].key for p in keyed for n in keyed[p])
