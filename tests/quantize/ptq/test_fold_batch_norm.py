"""Folding: the float output stays, the norm becomes the identity, factors are those of float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdq import models
from kdq.quantize import calibrate, uniform_rules
from kdq.quantize.ptq.fold_batch_norm import fold_batch_norm
from kdq.quantize.ptq.norms import is_folded, list_norms


class Pair(nn.Module):
    """A layer and a norm, then something that is not linear."""

    layer: nn.Module
    norm: nn.Module

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(self.norm(self.layer(x)))


def _norm(**kwargs):
    return nn.BatchNorm(use_running_average=True, **kwargs)


def _draw(model, *inputs, seed=0, **kwargs):
    """Variables with statistics and factors far from the identity."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path[-1].key in ("scale", "var"):
            values = rng.uniform(0.3, 2.0, size=leaf.shape)
        elif path[-1].key == "kernel":
            values /= np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(values, jnp.float32)

    shapes = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, **kwargs), *inputs)
    return jax.tree.map_with_path(draw, shapes)


def _image(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def _change(model, variables, folded, x, **kwargs):
    forward = jax.jit(lambda v: model.apply(v, x, **kwargs))
    a, b = (np.asarray(forward(v), np.float64) for v in (variables, folded))
    return np.abs(a - b).max() / np.abs(a).max()


EINSUM = nn.Einsum((6, 2, 4), "btd,dhk->bhtk")
CASES = {
    "dense": (nn.Dense(5), _norm(), (7, 6)),
    "dense without bias": (nn.Dense(5, use_bias=False), _norm(epsilon=1e-3), (7, 6)),
    "no scale": (nn.Dense(5), _norm(use_scale=False), (7, 6)),
    "no bias anywhere": (nn.Dense(5, use_bias=False), _norm(use_bias=False), (7, 6)),
    "no parameters": (nn.Dense(5), _norm(use_bias=False, use_scale=False), (7, 6)),
    "conv": (nn.Conv(8, (3, 3), strides=2, use_bias=False), _norm(), (2, 7, 7, 4)),
    "grouped": (nn.Conv(8, (3, 3), feature_group_count=2), _norm(), (2, 5, 5, 4)),
    "depthwise": (nn.Conv(4, (3, 3), feature_group_count=4), _norm(), (2, 5, 5, 4)),
    "transposed": (nn.ConvTranspose(6, (2, 2), strides=(2, 2)), _norm(), (2, 3, 3, 4)),
    "transposed kernel": (
        nn.ConvTranspose(6, (2, 2), transpose_kernel=True),
        _norm(),
        (2, 3, 3, 4),
    ),
    "general, last axis": (nn.DenseGeneral((2, 4)), _norm(), (7, 3, 6)),
    "general, both axes": (nn.DenseGeneral((2, 4)), _norm(axis=(-2, -1)), (7, 3, 6)),
    "general, first axis": (nn.DenseGeneral((2, 4), use_bias=False), _norm(axis=-2), (7, 3, 6)),
    "general, batched": (nn.DenseGeneral(4, batch_dims=(0,)), _norm(axis=(0, -1)), (3, 5, 6)),
    "einsum": (EINSUM, _norm(axis=(1, 3)), (7, 3, 6)),
    "einsum, one axis": (EINSUM, _norm(axis=1), (7, 3, 6)),
    "einsum, turned": (nn.Einsum((2, 6, 4), "...d,hdk->...kh"), _norm(axis=(-2, -1)), (7, 3, 6)),
}


DEFAULT = [n for n in CASES if "," not in n] + ["general, both axes"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in CASES]
)
def test_every_kind_of_layer_folds_and_the_output_stays(name):
    layer, norm, shape = CASES[name]
    model, x = Pair(layer, norm), _image(*shape)
    variables = _draw(model, x)
    snapshot = jax.tree.map(np.array, variables)
    folded, qparams = fold_batch_norm(model, variables, {}, [x])
    assert qparams == {}
    assert _change(model, variables, folded, x) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, variables, snapshot)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, variables)
    # What is left of the norm shifts each channel by a constant.
    y = jnp.asarray(np.random.default_rng(2).normal(size=layer.apply(_own(folded), x).shape))
    own = {
        "batch_stats": folded["batch_stats"]["norm"],
        "params": folded["params"].get("norm", {}),
    }
    shift = np.asarray(norm.apply(own, y) - y)
    axes = tuple(i for i in range(y.ndim) if i - y.ndim not in _axes(norm, y.ndim))
    np.testing.assert_allclose(np.ptp(shift, axes), 0, atol=1e-6)
    assert np.abs(shift).max() < 1e-6 or "bias" not in folded["params"]["layer"]
    assert is_folded(list_norms(model, folded, x)["norm"], folded)
    assert not is_folded(list_norms(model, variables, x)["norm"], variables)


def _own(variables):
    return {"params": variables["params"]["layer"]}


def _axes(norm, rank):
    axes = norm.axis if isinstance(norm.axis, tuple) else (norm.axis,)
    return [axis % rank - rank for axis in axes]


def test_the_numbers_are_those_of_the_formula():
    model, x = Pair(nn.Conv(3, (2, 2)), _norm(epsilon=1e-2)), _image(2, 4, 4, 2)
    variables = _draw(model, x)
    folded, _ = fold_batch_norm(model, variables, {}, [x])
    layer, norm = (variables["params"][k] for k in ("layer", "norm"))
    stats = variables["batch_stats"]["norm"]
    for c in range(3):
        factor = float(norm["scale"][c]) / np.sqrt(float(stats["var"][c]) + 1e-2)
        bias = (float(layer["bias"][c]) - float(stats["mean"][c])) * factor + float(norm["bias"][c])
        kernel = np.asarray(layer["kernel"], np.float64)[..., c] * factor
        new = folded["params"]["layer"]
        np.testing.assert_allclose(new["kernel"][..., c], kernel, rtol=1e-6)
        np.testing.assert_allclose(new["bias"][c], bias, rtol=1e-6, atol=1e-7)
    identity = {"scale": np.ones(3), "bias": np.zeros(3)}
    jax.tree.map(np.testing.assert_array_equal, folded["params"]["norm"], identity)
    left = folded["batch_stats"]["norm"]
    np.testing.assert_array_equal(left["mean"], np.zeros(3))
    np.testing.assert_array_equal(left["var"] + np.float32(1e-2), np.ones(3, np.float32))


def test_a_residual_network_keeps_its_output(caplog):
    model, x = models.build("resnet", num_classes=10, depth=8, widths=(4, 4, 6, 8)), None
    x = _image(4, 8, 8, 3)
    variables = _draw(model, x)
    folded, _ = fold_batch_norm(model, variables, {}, [x])
    assert _change(model, variables, folded, x) < 1e-5
    norms = list_norms(model, folded, x)
    assert len(norms) == 9
    assert all(is_folded(norm, folded) for norm in norms.values())
    assert not caplog.records


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(4, use_bias=False, name="dense")(x)
        return jnp.tanh(_norm(name="norm")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


def test_a_scanned_stack_folds_each_of_its_layers():
    model, x = Scanned(), _image(6, 4)
    variables = _draw(model, x)
    folded, _ = fold_batch_norm(model, variables, {}, [x])
    assert _change(model, variables, folded, x) < 1e-5
    for i in range(3):
        stats, norm = (variables[c]["layers"]["norm"] for c in ("batch_stats", "params"))
        factor = np.float64(norm["scale"][i]) / np.sqrt(np.float64(stats["var"][i]) + 1e-5)
        kernel = np.float64(variables["params"]["layers"]["dense"]["kernel"][i]) * factor
        np.testing.assert_allclose(
            folded["params"]["layers"]["dense"]["kernel"][i], kernel, rtol=1e-6
        )


class Odd(nn.Module):
    """One pair that folds, and one that does not."""

    what: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(_norm(name="good_norm")(nn.Dense(4, name="good")(x)))
        dense = nn.Dense(4, name="odd")
        y = dense(x)
        norm = _norm(name="odd_norm", axis=1 if self.what == "axis" else -1)
        if self.what == "relu":
            y = nn.relu(y)
        if self.what == "shared layer":
            x = dense(x)
        if self.what == "two norms":
            x = _norm(name="third_norm")(y)
        if self.what == "shared norm":
            x = norm(x)
        z = norm(y)
        return z + y if self.what == "used elsewhere" else z + x


REASONS = {
    "used elsewhere": r"odd_norm' stays: the model's output would change by .*'odd' used elsewhere",
    "relu": "odd_norm' stays: its input is not the output of a layer",
    "shared layer": "odd_norm' stays: 'odd' is shared",
    "two norms": r"odd_norm' stays: the output of 'odd' also goes to \['third_norm'\]",
    "shared norm": "odd_norm' stays: shared: it normalizes",
    "axis": "odd_norm' stays: its axes .* are not output channels of Dense 'odd'",
}


@pytest.mark.parametrize("what", REASONS)
def test_what_cannot_be_folded_stays_and_is_named_with_the_reason(what, caplog):
    model, x = Odd(what), _image(5, 4, 4)
    variables = _draw(model, x)
    with caplog.at_level("WARNING", logger="absl"):
        folded, _ = fold_batch_norm(model, variables, {}, [x])
    assert _change(model, variables, folded, x) < 1e-5
    for name in ("odd", "odd_norm"):
        jax.tree.map(
            np.testing.assert_array_equal, folded["params"][name], variables["params"][name]
        )
    assert is_folded(list_norms(model, folded, x)["good_norm"], folded)
    assert re.search(REASONS[what], caplog.text)


def test_a_block_that_is_shared_with_its_norm_folds():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense, norm = nn.Dense(4, name="dense"), _norm(name="norm")
            return norm(dense(jnp.tanh(norm(dense(x)))))

    model, x = Shared(), _image(6, 4)
    variables = _draw(model, x)
    folded, _ = fold_batch_norm(model, variables, {}, [x])
    assert _change(model, variables, folded, x) < 1e-5
    assert is_folded(list_norms(model, folded, x)["norm"], folded)


def test_refuses_what_it_can_not_work_with():
    model, x = Pair(nn.Dense(5), _norm()), _image(7, 6)
    variables = _draw(model, x)
    qparams = calibrate(model, variables, uniform_rules(4, 4), [x], check=False)
    with pytest.raises(ValueError, match=r"fold_batch_norm changes weights"):
        fold_batch_norm(model, variables, qparams, [x])
    with pytest.raises(ValueError, match="fold_batch_norm got no batches"):
        fold_batch_norm(model, variables, {}, [])
    with pytest.raises(ValueError, match="output is not finite"):
        fold_batch_norm(model, variables, {}, [x.at[0, 0].set(jnp.nan)])
