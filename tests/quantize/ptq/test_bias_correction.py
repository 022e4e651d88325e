"""Bias correction against float64 by hand; then each layer has the mean output of the float one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdq import models
from kdq.quantize import apply, calibrate, uniform_rules
from kdq.quantize.ptq.bias_correction import bias_correction
from kdq.quantize.ptq.reestimate import reestimate

CAPTURE = {"capture_intermediates": True, "mutable": ["intermediates"]}


def _draw(model, *inputs, seed=0, **kwargs):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 2, size=leaf.shape), jnp.float32)
        return jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32)

    shapes = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, **kwargs), *inputs)
    return jax.tree.map_with_path(draw, shapes)


def _batches(n, shape, seed=1):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape) + 0.5 * k, jnp.float32) for k in range(n)]


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="first")(x))
        return nn.Dense(4, name="second")(x)


def _round(x, quantizer):
    scale, low, high = (
        np.asarray(getattr(quantizer, k), np.float64) for k in ("scale", "qmin", "qmax")
    )
    return np.clip(np.round(x / scale), low, high) * scale


def test_biases_by_hand():
    """The second layer's error is measured behind the first one's correction."""
    model, batches = Mlp(), _batches(3, (8, 5))
    variables = _draw(model, batches[0])
    qparams = calibrate(model, variables, uniform_rules(2, 4), batches, check=False)
    snapshot = jax.tree.map(np.array, variables)
    found, same = bias_correction(model, variables, qparams, batches)
    assert same is qparams
    jax.tree.map(np.testing.assert_array_equal, variables, snapshot)
    clean = rounded = np.concatenate([np.float64(x) for x in batches])
    for name in ("first", "second"):
        own, q = jax.tree.map(np.float64, variables["params"][name]), qparams[name]
        clean = clean @ own["kernel"] + own["bias"]
        rounded = _round(rounded, q["activations"]) @ _round(own["kernel"], q["weights"])
        bias = clean.mean(0) - rounded.mean(0)
        np.testing.assert_allclose(found["params"][name]["bias"], bias, rtol=1e-4, atol=1e-5)
        assert np.abs(bias - own["bias"]).max() > 0.05
        np.testing.assert_array_equal(found["params"][name]["kernel"], own["kernel"])
        clean, rounded = np.maximum(clean, 0), np.maximum(rounded + bias, 0)


class Mixed(nn.Module):
    """Grouped and strided convolutions before a norm and without, a shared layer, several axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name="strided")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x))
        x = nn.relu(nn.ConvTranspose(6, (2, 2), strides=(2, 2), name="up")(x))
        shared = nn.Dense(6, name="shared")
        x = nn.relu(shared(nn.relu(shared(x))))
        x = nn.DenseGeneral((2, 3), name="general")(x.mean(1))
        return nn.Einsum((2, 3, 5), "bthd,hdk->bkht", name="einsum")(nn.relu(x))


def _channel_means(model, variables, qparams, batches, sizes):
    """{layer: mean of its outputs by channel}, from Flax's own capture."""
    run = jax.jit(lambda v, q, x: apply(model, v, q, x, **CAPTURE)[1]["intermediates"])
    seen = [run(variables, qparams, x) for x in batches]
    means = {}
    for name, axes in sizes.items():
        calls = [np.float64(y) for s in seen for y in s[name]["__call__"]]
        flat = [np.moveaxis(y, axes, range(-len(axes), 0)) for y in calls]
        kept = flat[0].shape[-len(axes) :]
        means[name] = np.concatenate([y.reshape(-1, *kept) for y in flat]).mean(0)
    return means


def test_every_layer_has_the_float_mean_afterwards(caplog):
    model, batches = Mixed(), _batches(2, (4, 7, 7, 4))
    variables = _draw(model, batches[0])
    qparams = calibrate(model, variables, uniform_rules(3, 4), batches, check=False)
    found, _ = bias_correction(model, variables, qparams, batches)
    last = dict.fromkeys(("grouped", "up"), (-1,))
    axes = {"norm": (-1,), **last, "general": (-2, -1), "einsum": (1, 2)}
    wanted, before, after = (
        _channel_means(model, v, q, batches, axes)
        for v, q in ((variables, {}), (variables, qparams), (found, qparams))
    )
    for name in axes:
        size = np.abs(wanted[name]).max()
        assert np.abs(before[name] - wanted[name]).max() > 0.02 * size
        # What the shared layer's second call gets depends on its own correction.
        assert np.abs(after[name] - wanted[name]).max() < 1e-4 * size, name
    np.testing.assert_array_equal(
        found["params"]["norm"]["bias"], variables["params"]["norm"]["bias"]
    )
    assert not caplog.records


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(4, name="b")(nn.relu(nn.Dense(4, name="a")(x)))
        self.sow("intermediates", "seen", y)
        return x + y, None


class Scanned(nn.Module):
    """Two stacks of the same depth, one inside the other's sibling."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "intermediates": 0}
        for name in ("lower", "upper"):
            stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
            x, _ = stack(name=name)(x, None)
        return x


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Scanned(name="inner")(x)


@pytest.mark.slow
def test_the_layers_of_a_stack_are_corrected_one_after_the_other():
    model, batches = Outer(), _batches(2, (16, 4))
    variables = {"params": _draw(model, batches[0])["params"]}
    qparams = calibrate(model, variables, uniform_rules(2, 4), batches, check=False)
    found, _ = bias_correction(model, variables, qparams, batches)
    run = jax.jit(lambda v, q, x: apply(model, v, q, x, mutable=["intermediates"])[1])

    def means(v, q):
        seen = [run(v, q, x)["intermediates"]["inner"] for x in batches]
        return {
            k: np.concatenate([np.float64(s[k]["seen"][0]) for s in seen], 1).mean(1)
            for k in ("lower", "upper")
        }

    wanted, before, after = means(variables, {}), means(variables, qparams), means(found, qparams)
    for name in wanted:
        assert np.abs(before[name] - wanted[name]).max((1,)).min() > 0.02
        np.testing.assert_allclose(after[name], wanted[name], atol=1e-4)


@pytest.mark.slow
def test_what_has_no_bias_is_named(caplog):
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(7, 4, name="embed")(tokens)
            x = nn.MultiHeadDotProductAttention(2, use_bias=False, name="attn")(x)
            x = nn.LayerNorm(name="norm")(nn.Dense(3, use_bias=False, name="bare")(x))
            return nn.Dense(2, name="head")(x)

    model, tokens = Bare(), jnp.arange(12).reshape(3, 4) % 7
    variables = _draw(model, tokens)
    qparams = calibrate(model, variables, uniform_rules(3, 4), [tokens], check=False)
    del qparams["attn/query"], qparams["attn/key"], qparams["attn/value"]
    with caplog.at_level("WARNING", logger="absl"):
        found, _ = bias_correction(model, variables, qparams, [tokens])
    for path, reason in {
        "embed": "Embed has no bias",
        "attn/qk": "Product has no bias",
        "attn/av": "Product has no bias",
        "attn/out": "it has no bias, and its output goes into no batch norm alone",
        "bare": "it has no bias, and its output goes into no batch norm alone",
    }.items():
        assert f"{path!r} stays as it is: {reason}" in caplog.text
    assert len(caplog.records) == 5
    changed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(
            jax.tree.leaves_with_path(found["params"]),
            jax.tree.leaves(variables["params"]),
            strict=True,
        )
        if (a != b).any()
    ]
    assert changed == ["head/bias"]


def test_reestimation_afterwards_does_not_count_the_error_twice():
    model = models.build("cnn", num_classes=3, widths=(4, 6), batch_norm=True)
    x = _batches(1, (8, 6, 6, 2))[0]
    variables = _draw(model, x)
    qparams = calibrate(model, variables, uniform_rules(2, 4), [x], check=False)
    alone, _ = reestimate(model, variables, qparams, [x])
    corrected, _ = bias_correction(model, variables, qparams, [x])
    both, _ = reestimate(model, corrected, qparams, [x])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, both["batch_stats"], alone["batch_stats"])
    # The head, which has a bias of its own, was corrected.
    assert (
        np.abs(corrected["params"]["head"]["bias"] - alone["params"]["head"]["bias"]).max() > 0.01
    )


def test_bad_data_is_refused_with_the_layer():
    model, batches = Mlp(), _batches(2, (8, 5))
    variables = _draw(model, batches[0])
    qparams = calibrate(model, variables, uniform_rules(2, 4), batches, check=False)
    with pytest.raises(ValueError, match="bias_correction got no batches"):
        bias_correction(model, variables, qparams, [])
    batches[1] = batches[1].at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match="NaN or infinity in the output of layer 'first'"):
        bias_correction(model, variables, qparams, batches)
