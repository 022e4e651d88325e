"""sqnr: every ratio against NumPy in float64, and the warning of calibrate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from kdq import quantize
from kdq.quantize import QuantizationRule, TensorSpec


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="first")(x))
        return {"logits": nn.Dense(3, name="second")(x), "count": jnp.arange(3)}


X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
BATCHES = [X[:8], X[8:]]


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    layer = lambda i, o: {"kernel": draw(i, o), "bias": draw(o)}
    return {"params": {"first": layer(4, 6), "second": layer(6, 3)}}


def rules(weight_bits, input_bits):
    spec = lambda bits: TensorSpec(bits=bits)
    return (
        QuantizationRule(path="first", weights=spec(weight_bits), activations=spec(input_bits)),
        QuantizationRule(path="second", weights=spec(weight_bits)),
    )


def rounded(x, bits):
    """Symmetric by the largest, in float64."""
    scale = np.float64(np.float32(np.abs(x).max() / np.float32(2 ** (bits - 1) - 1)))
    return scale * np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def decibel(signal, error):
    return 10 * np.log10(np.sum(np.square(signal)) / np.sum(np.square(error)))


def test_every_ratio_is_that_of_numpy(variables):
    qparams = quantize.calibrate(Net(), variables, rules(3, 4), BATCHES, check=False)
    table = quantize.sqnr(Net(), variables, qparams, BATCHES)
    params = jax.tree.map(np.float64, variables["params"])
    (w, b), (v, c) = ((params[n]["kernel"], params[n]["bias"]) for n in ("first", "second"))
    x, xq, wq, vq = np.float64(X), rounded(np.float64(X), 4), rounded(w, 3), rounded(v, 3)
    hidden, hidden_q = x @ w + b, xq @ wq + b
    logits, logits_q = (np.maximum(h, 0) @ k + c for h, k in ((hidden, v), (hidden_q, vq)))
    assert list(table.layers) == ["first", "second"]
    first, second = table.layers.values()
    want = {
        first.weights: decibel(w, w - wq),
        first.inputs["activations"]: decibel(x, x - xq),
        first.output: decibel(hidden, hidden - hidden_q),
        second.weights: decibel(v, v - vq),
        second.output: decibel(logits, logits - logits_q),
        table.output: decibel(logits, logits - logits_q),
    }
    np.testing.assert_allclose(list(want), list(want.values()), rtol=1e-4)
    assert second.inputs == {}
    assert (first.bits, second.bits) == ("W3A4", "W3A32")
    np.testing.assert_allclose(first.signal, np.square(hidden).sum(), rtol=1e-5)
    np.testing.assert_allclose(table.signal, np.square(logits).sum(), rtol=1e-5)
    last = str(table).splitlines()[-1].split()
    assert last[-2:] == [f"{table.output:.1f}", f"{table.signal:.4g}"]


def test_a_float_model_has_no_noise(variables):
    table = quantize.sqnr(Net(), variables, {}, BATCHES)
    assert [layer.output for layer in table.layers.values()] == [np.inf, np.inf]
    assert table.output == np.inf
    assert table.low() == {}


def test_of_a_stack_each_layer_has_a_ratio_of_its_own():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.scan(
                lambda dense, x, _: (dense(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return layer(nn.Dense(4, name="dense"), x, None)[0]

    kernel = np.random.default_rng(2).normal(size=(2, 4, 4)).astype(np.float32)
    variables = {"params": {"dense": {"kernel": kernel, "bias": np.zeros((2, 4), np.float32)}}}
    rule = (QuantizationRule(path=".*", weights=TensorSpec(bits=3)),)
    qparams = quantize.calibrate(Stack(), variables, rule, [X], check=False)
    table = quantize.sqnr(Stack(), variables, qparams, [X])
    clean, noisy = np.float64(X), np.float64(X)
    for i, layer in enumerate(np.float64(kernel)):
        clean, noisy = clean @ layer, noisy @ rounded(layer, 3)
        ratios = table.layers[f"dense[{i}]"]
        np.testing.assert_allclose(ratios.weights, decibel(layer, layer - rounded(layer, 3)), 1e-4)
        np.testing.assert_allclose(ratios.output, decibel(clean, clean - noisy), 1e-4)


@pytest.fixture
def warnings(monkeypatch):
    """What absl was told to warn of."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def test_calibrate_warns_of_noise_and_says_what_to_try(variables, warnings):
    qparams = quantize.calibrate(Net(), variables, rules(1, 2), BATCHES)
    (line,) = warnings
    table = quantize.sqnr(Net(), variables, qparams, BATCHES[:1])
    assert f"the model's outputs: {table.output:.1f} dB" in line
    for name, ratio in table.low().items():
        assert f"{name!r} {ratio:.1f} dB" in line
    for word in ("more bits", "per_channel", "equalize", "gptq", "QAT", "float"):
        assert word in line
    assert table.output < 10


def test_calibrate_does_not_warn_of_eight_bits_or_when_told_not_to(variables, warnings):
    quantize.calibrate(Net(), variables, rules(8, 8), BATCHES)
    quantize.calibrate(Net(), variables, rules(1, 2), BATCHES, check=False)
    assert warnings == []
