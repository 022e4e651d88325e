"""Equalization, SmoothQuant and AWQ: the formulas of their papers in float64, and the function."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from kdq.models import build
from kdq.quantize import QuantizationRule, TensorSpec, apply, calibrate
from kdq.quantize.ptq.awq import awq
from kdq.quantize.ptq.equalize import equalize
from kdq.quantize.ptq.fold_batch_norm import fold_batch_norm
from kdq.quantize.ptq.smooth import smooth


class Chain(nn.Module):
    """Three layers in a row; ranges of the middle one's channels depend on both others."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (2, 2), name="a")(x))
        x = nn.relu(nn.Conv(6, (2, 2), feature_group_count=2, strides=2, name="b")(x))
        return nn.Dense(3, name="c")(x.mean((1, 2)))


class Block(nn.Module):
    """A normalization that two layers read, in a scan."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm(name="norm")(x)
        h = nn.gelu(nn.Dense(5, name="gate")(h)) * nn.Dense(5, name="value")(h)
        return x + nn.Dense(4, name="out")(h), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(3, name="head")(body(name="blocks")(x, None)[0])


def _variables(model, shape, spread=0.0, size=1.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    draw = lambda s: size * rng.normal(size=s.shape) * np.exp(spread * rng.normal(size=s.shape[-1]))
    return jax.tree.map(lambda s: draw(s).astype(np.float32), shapes), x


def _same_function(model, before, after, x):
    run = jax.jit(model.apply)
    other = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    expected = np.asarray(run(before, other))
    np.testing.assert_allclose(run(after, other), expected, atol=1e-5 * np.abs(expected).max())


def _kernels(variables):
    params = variables["params"].items()
    return {p: np.asarray(v["kernel"], np.float64) for p, v in params if "kernel" in v}


def _by_input(kernel, groups):
    """Largest weight of each input of a grouped convolution: inputs of a group are in a row."""
    split = np.split(np.abs(kernel), groups, axis=-1)
    return np.concatenate([part.max((0, 1, 3)) for part in split])


def test_equalization_by_the_rule_of_the_paper():
    model = Chain()
    variables, x = _variables(model, (4, 4, 4, 3), spread=1.5)
    variables["params"]["a"]["kernel"][..., 2] = 0  # a dead channel stays
    equal, qparams = equalize(model, variables, {}, [x], tolerance=1e-5)
    assert qparams == {}
    _same_function(model, variables, equal, x)
    kernels = _kernels(variables)
    biases = {p: np.asarray(variables["params"][p]["bias"], np.float64) for p in kernels}
    for _ in range(200):
        for one, other in (("a", "b"), ("b", "c")):
            r1 = np.abs(kernels[one]).max((0, 1, 2))
            r2 = _by_input(kernels["b"], 2) if other == "b" else np.abs(kernels["c"]).max(1)
            s = np.array(
                [np.sqrt(p * q) / q if p * q else 1.0 for p, q in zip(r1, r2, strict=True)]
            )
            kernels[one], biases[one] = kernels[one] / s, biases[one] / s
            if other == "c":
                kernels["c"] = kernels["c"] * s[:, None]
            else:  # 2 groups of 2 inputs and 3 outputs
                for c in range(4):
                    outputs = slice(3 * (c // 2), 3 * (c // 2) + 3)
                    kernels["b"][:, :, c % 2, outputs] *= s[c]
    for path, expected in kernels.items():
        np.testing.assert_allclose(equal["params"][path]["kernel"], expected, rtol=1e-4)
        np.testing.assert_allclose(equal["params"][path]["bias"], biases[path], rtol=1e-4)
    # What it is for: one scale for the whole of a weight, which uneven channels waste.
    rules = (QuantizationRule(path=".*", weights=TensorSpec(bits=5)),)
    run = lambda v: np.asarray(apply(model, v, calibrate(model, v, rules, [x]), x))
    exact = np.asarray(model.apply(variables, x))
    assert np.square(run(equal) - exact).sum() < 0.5 * np.square(run(variables) - exact).sum()


def test_a_folded_batch_norm_is_part_of_its_layer():
    """What it adds is rescaled too, so that convolutions without a bias have even ranges."""
    model = build("cnn", num_classes=3, widths=(4, 6), batch_norm=True)
    x = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    rng = np.random.default_rng(1)
    noise = lambda a: (np.asarray(a) * np.exp(rng.normal(size=a.shape)) + 0.1).astype(np.float32)
    folded, _ = fold_batch_norm(model, jax.tree.map(noise, variables), {}, [x])
    assert "bias" not in folded["params"]["conv_0"]
    equal, _ = equalize(model, folded, {}, [x])
    _same_function(model, folded, equal, x)
    kernels = _kernels(equal)
    np.testing.assert_allclose(
        np.abs(kernels["conv_0"]).max((0, 1, 2)), np.abs(kernels["conv_1"]).max((0, 1, 3)), 1e-2
    )
    before = _kernels(folded)
    uneven = np.abs(before["conv_0"]).max((0, 1, 2)) / np.abs(before["conv_1"]).max((0, 1, 3))
    assert uneven.max() / uneven.min() > 1.5


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_smoothing_by_the_formula_of_the_paper(alpha):
    model = Stack()
    variables, x = _variables(model, (6, 3, 4), size=0.5)  # no GELU ends in its tail, in noise
    smoothed, _ = smooth(model, variables, {}, [x[:3], x[3:]], alpha=alpha)
    _same_function(model, variables, smoothed, x)
    before = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"]["blocks"])
    hidden = x.astype(np.float64)
    for layer in range(2):
        own = jax.tree.map(lambda a, layer=layer: a[layer], before)
        mean, var = hidden.mean(-1, keepdims=True), hidden.var(-1, keepdims=True)
        normal = (hidden - mean) / np.sqrt(var + 1e-6) * own["norm"]["scale"] + own["norm"]["bias"]
        kernels = {name: own[name]["kernel"] for name in ("gate", "value")}
        weights = np.maximum(*(np.abs(kernel).max(1) for kernel in kernels.values()))
        s = np.abs(normal).max((0, 1)) ** alpha / weights ** (1 - alpha)
        found = jax.tree.map(lambda a, layer=layer: a[layer], smoothed["params"]["blocks"])
        for name in ("scale", "bias"):
            np.testing.assert_allclose(found["norm"][name], own["norm"][name] / s, rtol=1e-4)
        # "value" makes channels as well, that "out" takes.
        np.testing.assert_allclose(found["gate"]["kernel"], kernels["gate"] * s[:, None], rtol=1e-4)
        out = {name: normal @ own[name]["kernel"] + own[name]["bias"] for name in kernels}
        gelu = jax.nn.gelu(np.asarray(out["gate"], np.float32))
        product = np.asarray(gelu, np.float64) * out["value"]
        t = np.abs(product).max((0, 1)) ** alpha
        t = t / np.abs(own["out"]["kernel"]).max(1) ** (1 - alpha)
        np.testing.assert_allclose(
            found["value"]["kernel"], kernels["value"] * s[:, None] / t, rtol=1e-3
        )
        np.testing.assert_allclose(
            found["out"]["kernel"], own["out"]["kernel"] * t[:, None], rtol=1e-3
        )
        hidden = hidden + product @ own["out"]["kernel"] + own["out"]["bias"]


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, use_bias=False, name="b")(nn.relu(nn.Dense(16, name="a")(x)))


def _awq_factors(hidden, kernel, candidates, qmax):
    """The best factors by trying each power: float64, errors on the data itself."""
    best = (np.inf,)
    means = np.abs(hidden).mean(0)
    live = means > 0
    for i in range(candidates):
        s = np.where(live, means, 1.0) ** (i / candidates)
        s = np.where(live, s / np.sqrt(s[live].max() * s[live].min()), 1.0)
        scaled = kernel * s[:, None]
        scale = np.abs(scaled).max(0) / qmax
        rounded = np.clip(np.rint(scaled / scale), -qmax - 1, qmax) * scale
        error = np.square(hidden @ kernel - (hidden / s) @ rounded).sum()
        best = (error, i, s) if error < best[0] else best
    return best


@pytest.mark.slow
def test_awq_picks_what_trying_each_power_picks():
    model = Pair()
    variables, x = _variables(model, (64, 6), spread=1.5)
    spec = TensorSpec(bits=3, granularity="per_channel")
    rules = (QuantizationRule(path="b", weights=spec),)
    scaled, _ = awq(model, variables, {}, [x[:32], x[32:]], rules=rules)
    _same_function(model, variables, scaled, x)
    first, kernel = (np.asarray(variables["params"][p]["kernel"], np.float64) for p in "ab")
    hidden = np.maximum(x @ first + variables["params"]["a"]["bias"], 0)
    error, power, s = _awq_factors(hidden, kernel, 20, 3)
    assert power > 0
    np.testing.assert_allclose(scaled["params"]["b"]["kernel"], kernel * s[:, None], rtol=1e-4)
    np.testing.assert_allclose(scaled["params"]["a"]["kernel"], first / s, rtol=1e-4)
    exact = np.asarray(model.apply(variables, x), np.float64)
    run = lambda v: np.square(apply(model, v, calibrate(model, v, rules, [x]), x) - exact).sum()
    np.testing.assert_allclose(run(scaled), error, rtol=1e-3)
    assert error < 0.7 * run(variables)


@pytest.mark.slow
def test_awq_in_a_scan_and_on_groups_never_loses():
    model = Stack()
    variables, x = _variables(model, (16, 3, 4), spread=1.0)
    spec = TensorSpec(bits=3, granularity="per_group", group_size=2)
    rules = (QuantizationRule(path="blocks/(gate|value)", weights=spec),)
    scaled, _ = awq(model, variables, {}, [x], rules=rules, candidates=8)
    _same_function(model, variables, scaled, x)
    moved = [np.asarray(v["params"]["blocks"]["gate"]["kernel"]) for v in (variables, scaled)]
    assert np.abs(moved[0] - moved[1]).max() > 0
    exact = np.asarray(model.apply(variables, x), np.float64)
    run = lambda v: np.square(apply(model, v, calibrate(model, v, rules, [x]), x) - exact).sum()
    assert run(scaled) < run(variables)


@pytest.mark.parametrize("method", [equalize, smooth, awq])
def test_bad_input_is_refused(method):
    model = Pair()
    variables, x = _variables(model, (8, 6))
    with pytest.raises(ValueError, match=f"{method.__name__} got no batches"):
        method(model, variables, {}, [])
    with pytest.raises(ValueError, match=r"comes before calibrate.*\['a'\]"):
        method(model, variables, {"a": {}}, [x])
    options = {"equalize": "iterations", "smooth": "alpha", "awq": "candidates"}
    name = options[method.__name__]
    with pytest.raises(ValueError, match=f"{name}=-1"):
        method(model, variables, {}, [x], **{name: -1})
