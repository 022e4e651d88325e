"""AdaRound against every possible rounding of small layers, and an unrolled stack."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import linen as nn

from kdq.quantize import Quantizer, apply, fake_quantize
from kdq.quantize.ptq.adaround import adaround


def _correlated(rows, width, seed=0, decay=8.0):
    """[rows, width]: a few directions have most of the variance."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) * np.exp(-np.arange(width) / decay)[:, None]
    return (rng.normal(size=(rows, width)) @ mix / 4).astype(np.float32)


def _draw(model, *inputs, seed=0):
    """Variables of the model's shapes, without compiling its initializers."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape) / np.sqrt(max(s.shape[-2:])), jnp.float32)
    return jax.tree.map(draw, shapes)


def _quantizer(weight, bits, stack=(), part=0.8):
    """Symmetric, a scale for each output; made without compiling anything."""
    axes = tuple(range(len(stack), weight.ndim - 1))
    reach = part * np.abs(weight).max(axes, keepdims=True)
    fill = lambda value, shape: np.full(shape, value, np.float32)
    top = 2.0 ** (bits - 1)
    return Quantizer(
        scale=jnp.asarray(reach / (top - 0.5), jnp.float32),
        zero_point=jnp.asarray(fill(0, reach.shape)),
        qmin=jnp.asarray(fill(-top, stack)),
        qmax=jnp.asarray(fill(top - 1, stack)),
    )


def _mse(a, b):
    return np.mean((np.float64(a) - np.float64(b)) ** 2)


def _choices(weight, quantizer):
    """Every rounding up or down of a weight on a symmetric grid, in float64."""
    scale = np.broadcast_to(np.float64(quantizer.scale), weight.shape)
    down = np.floor(np.float64(weight) / scale)
    for up in itertools.product((0, 1), repeat=weight.size):
        codes = down + np.reshape(up, weight.shape)
        yield np.clip(codes, float(quantizer.qmin), float(quantizer.qmax)) * scale


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(9, name="a")(x))
        return nn.Dense(1, use_bias=False, name="b")(inputs=x)  # by name, as `apply` has one


@pytest.mark.slow
def test_second_layer_is_close_to_the_best_of_all_roundings_given_the_quantized_first():
    x = jnp.asarray(_correlated(48, 6))
    variables = _draw(Two(), x, seed=10)
    qparams = {
        k: {"weights": _quantizer(np.asarray(variables["params"][k]["kernel"]), 2)} for k in "ab"
    }
    before = jax.tree.map(np.array, (variables, qparams))
    rounded, same = adaround(Two(), variables, qparams, [x[:24], x[24:]], steps=600)
    jax.tree.map(np.testing.assert_array_equal, before, (variables, qparams))
    jax.tree.map(np.testing.assert_array_equal, same, qparams)

    # Asymmetric: what comes in is quantized, what is wanted is float.
    a, b = (np.float64(variables["params"][k]["kernel"]) for k in "ab")
    bias = np.float64(variables["params"]["a"]["bias"])
    wanted = np.maximum(np.float64(x) @ a + bias, 0) @ b
    hidden = np.maximum(np.float64(x) @ np.float64(rounded["params"]["a"]["kernel"]) + bias, 0)
    weights = qparams["b"]["weights"]
    errors = sorted(_mse(hidden @ w, wanted) for w in _choices(b, weights))
    found = _mse(hidden @ np.float64(rounded["params"]["b"]["kernel"]), wanted)
    nearest = _mse(hidden @ np.float64(fake_quantize(jnp.float32(b), weights)), wanted)
    assert nearest > 3 * errors[0]
    assert found <= errors[2] * 1.001  # of 512


def test_the_error_falls_on_correlated_inputs_and_weights_are_on_the_grid():
    x = jnp.asarray(_correlated(256, 32))
    model = nn.Dense(16)
    variables = _draw(model, x)
    wanted = model.apply(variables, x)
    for bits, factor in ((4, 3.0), (3, 3.0), (2, 3.0)):
        qparams = {"": {"weights": _quantizer(np.asarray(variables["params"]["kernel"]), bits)}}
        rounded, _ = adaround(model, variables, qparams, [x])
        kernel = rounded["params"]["kernel"]
        np.testing.assert_array_equal(fake_quantize(kernel, qparams[""]["weights"]), kernel)
        np.testing.assert_array_equal(rounded["params"]["bias"], variables["params"]["bias"])
        nearest = _mse(apply(model, variables, qparams, x), wanted)
        assert _mse(apply(model, rounded, qparams, x), wanted) < nearest / factor


@pytest.mark.slow
def test_a_strided_grouped_convolution_of_smooth_images():
    noise = np.random.default_rng(0).normal(size=(64, 6, 6, 4))
    x = jnp.asarray(noise.cumsum(1).cumsum(2) / 4, jnp.float32)
    model = nn.Conv(8, (3, 3), strides=2, feature_group_count=2)
    variables = _draw(model, x)
    qparams = {"": {"weights": _quantizer(np.asarray(variables["params"]["kernel"]), 3)}}
    rounded, _ = adaround(model, variables, qparams, [x], steps=300)
    wanted = model.apply(variables, x)
    nearest = _mse(apply(model, variables, qparams, x), wanted)
    assert _mse(apply(model, rounded, qparams, x), wanted) < nearest / 3


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="down")(nn.relu(nn.Dense(6, name="up")(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Body, length=3, **axes)(name="layers")(x, None)[0]


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = Body(name=f"layer_{i}")(x, None)
        return x


@pytest.mark.slow
def test_a_scanned_stack_is_learned_as_its_layers_one_after_the_other():
    x = jnp.asarray(_correlated(64, 6))
    variables = _draw(Scanned(), x)
    stacked = variables["params"]["layers"]
    cut = lambda i: jax.tree.map(lambda a: a[i], stacked)
    unrolled = {"params": {f"layer_{i}": cut(i) for i in range(3)}}
    names = ("up", "down")
    whole = {n: _quantizer(np.asarray(stacked[n]["kernel"]), 3, stack=(3,)) for n in names}
    inputs = Quantizer(*map(jnp.float32, (0.05, 0, -128, 127)))
    tripled = jax.tree.map(lambda a: jnp.stack([a] * 3), inputs)
    qparams = {f"layers/{n}": {"weights": whole[n], "activations": tripled} for n in names}
    of_layers = {
        f"layer_{i}/{n}": {
            "weights": jax.tree.map(lambda a, i=i: a[i], whole[n]),
            "activations": inputs,
        }
        for i in range(3)
        for n in names
    }
    options = {"steps": 200, "batch_size": 16}
    found, expected = (
        adaround(model, v, q, [x], **options)[0]["params"]
        for model, v, q in ((Scanned(), variables, qparams), (Unrolled(), unrolled, of_layers))
    )
    changed = 0
    for i in range(3):
        for name in ("up", "down"):
            own, other = (
                np.asarray(w)
                for w in (
                    found["layers"][name]["kernel"][i],
                    expected[f"layer_{i}"][name]["kernel"],
                )
            )
            # Two programs, so a last bit may tip a weight that is nearly undecided.
            assert np.mean(~np.isclose(own, other, atol=1e-6)) < 0.06
            changed += np.abs(own - np.asarray(cut(i)[name]["kernel"])).max() > 0
    assert changed == 6


class Shared(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        shared = nn.Dense(6, name="shared")
        x = nn.Embed(9, 6, name="embed")(tokens)
        return shared(nn.relu(shared(x))).mean(1) @ jnp.ones((6, 2))


@pytest.mark.slow
def test_a_shared_layer_minds_all_its_calls_and_a_lookup_goes_to_the_nearest(monkeypatch):
    told = []
    monkeypatch.setattr(logging, "info", lambda text, *args: told.append(text % args))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 9, (32, 4)))
    variables = _draw(Shared(), tokens)
    qparams = {
        path: {"weights": _quantizer(np.asarray(variables["params"][path][name]), 3)}
        for path, name in (("embed", "embedding"), ("shared", "kernel"))
    }
    rounded, _ = adaround(Shared(), variables, qparams, [tokens], steps=300)
    np.testing.assert_array_equal(
        rounded["params"]["embed"]["embedding"],
        fake_quantize(variables["params"]["embed"]["embedding"], qparams["embed"]["weights"]),
    )
    assert any("'embed' is rounded to nearest: a lookup" in line for line in told)

    float_kernel, bias = (np.float64(variables["params"]["shared"][k]) for k in ("kernel", "bias"))
    tables = variables["params"]["embed"]["embedding"], rounded["params"]["embed"]["embedding"]
    exact, now = (np.float64(t)[np.asarray(tokens)] for t in tables)

    def errors(kernel):
        """Of both calls; the second's input is what the learned kernel made of the first's."""
        run = lambda x, w: x @ np.float64(w) + bias
        hidden, wanted = (np.maximum(run(*p), 0) for p in ((now, learned), (exact, float_kernel)))
        first = _mse(run(now, kernel), run(exact, float_kernel))
        return np.asarray([first, _mse(run(hidden, kernel), run(wanted, float_kernel))])

    learned = rounded["params"]["shared"]["kernel"]
    nearest = fake_quantize(variables["params"]["shared"]["kernel"], qparams["shared"]["weights"])
    assert (errors(learned) / errors(nearest)).mean() < 1


def test_bad_input():
    x = jnp.ones((4, 6))
    variables = _draw(Two(), x)
    qparams = {
        k: {"weights": _quantizer(np.asarray(variables["params"][k]["kernel"]), 2)} for k in "ab"
    }
    with pytest.raises(ValueError, match="adaround got no batches"):
        adaround(Two(), variables, qparams, [])
    with pytest.raises(ValueError, match="steps=0: expected more than 0"):
        adaround(Two(), variables, qparams, [x], steps=0)
    with pytest.raises(ValueError, match="NaN or infinity in the inputs or outputs of module 'a'"):
        adaround(Two(), variables, qparams, [x.at[1, 2].set(jnp.nan)])
