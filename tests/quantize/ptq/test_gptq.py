"""GPTQ against the same algorithm as its paper tells it, with whole inverses, in float64."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from kdq.quantize import (
    QuantizationRule,
    TensorSpec,
    apply,
    calibrate,
    fake_quantize,
    uniform_rules,
)
from kdq.quantize.ptq.gptq import gptq

RNG = np.random.default_rng(0)


def _correlated(samples, inputs, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(inputs, inputs)) * np.exp(-np.arange(inputs) / (inputs / 6))
    return (rng.normal(size=(samples, inputs)) @ mix.T).astype(np.float32)


def _nearest(value, scale, zero_point, qmin, qmax):
    return (np.clip(np.rint(value / scale + zero_point), qmin, qmax) - zero_point) * scale


def _oracle(x, weight, scale, qmin, qmax, damping, act_order):
    """Optimal brain quantization in a fixed order: after each input, its row leaves the inverse."""
    weight, x = weight.astype(np.float64).copy(), x.astype(np.float64)
    hessian = 2 * x.T @ x
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else range(len(hessian))
    inverse = np.linalg.inv(hessian)
    rounded = np.zeros_like(weight)
    for j in order:
        rounded[j] = _nearest(weight[j], scale[j], 0.0, qmin, qmax)
        weight -= np.outer(inverse[:, j], (weight[j] - rounded[j]) / inverse[j, j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return rounded


def _error(x, weight, rounded):
    return np.square(x.astype(np.float64) @ (np.asarray(weight, np.float64) - rounded)).sum()


def _dense(weight):
    return {"params": {"kernel": weight}}


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 6])
def test_the_codes_are_those_of_the_oracle(act_order, group_size):
    x, weight = _correlated(200, 24), RNG.normal(size=(24, 10)).astype(np.float32)
    granularity = "per_group" if group_size else "per_channel"
    spec = TensorSpec(bits=4, granularity=granularity, group_size=group_size)
    model = nn.Dense(10, use_bias=False)
    rules = (QuantizationRule(path=".*", weights=spec),)
    qparams = calibrate(model, _dense(weight), rules, [x])
    variables, same = gptq(
        model, _dense(weight), qparams, [x[:100], x[100:]], act_order=act_order, block_size=7
    )
    scale = np.repeat(
        np.abs(weight.reshape(-1, group_size or 24, 10)).max(1) / 7, group_size or 24, 0
    )
    expected = _oracle(x, weight, scale, -8, 7, 0.01, act_order)
    rounded = np.asarray(variables["params"]["kernel"])
    # A number between two codes may fall to the other side in float32, and takes others with it.
    assert (np.abs(rounded - expected) < 1e-5).mean() > 0.99
    assert same is qparams
    np.testing.assert_array_equal(fake_quantize(rounded, qparams[""]["weights"]), rounded)
    nearest = _nearest(weight, scale, 0.0, -8, 7)
    assert _error(x, weight, rounded) < 0.6 * _error(x, weight, nearest)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_error_of_a_strided_grouped_convolution_falls(bits):
    model = nn.Conv(8, (3, 3), strides=2, feature_group_count=2, use_bias=False, padding="SAME")
    x = _correlated(16 * 49, 4).reshape(16, 7, 7, 4).cumsum(1).cumsum(2) / 5
    variables = _dense(RNG.normal(size=(3, 3, 2, 8)).astype(np.float32))
    qparams = calibrate(model, variables, uniform_rules(bits, None), [x])
    rounded, _ = gptq(model, variables, qparams, [x])
    run = jax.jit(lambda v: model.apply(v, x))
    exact = run(variables)
    nearest = np.square(apply(model, variables, qparams, x) - exact).sum()
    assert np.square(run(rounded) - exact).sum() < 0.5 * nearest
    kernel = rounded["params"]["kernel"]
    np.testing.assert_array_equal(fake_quantize(kernel, qparams[""]["weights"]), kernel)
    # The groups know nothing of one another: those of a half of the model are its own.
    half = model.clone(features=4, feature_group_count=1)
    alone = _dense(variables["params"]["kernel"][..., :4])
    own = calibrate(half, alone, uniform_rules(bits, None), [x[..., :2]])
    expected = gptq(half, alone, own, [x[..., :2]])[0]["params"]["kernel"]
    np.testing.assert_allclose(kernel[..., :4], expected, atol=1e-6)


class Stack(nn.Module):
    """A lookup, layers in a scan, and one that is met twice."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(9, 6, name="table")(ids)
        body = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = body(name="layers")(x, None)
        shared = nn.Dense(6, name="shared")
        return nn.Dense(3, name="head")(shared(nn.relu(shared(x))))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="dense")(x), None


@pytest.fixture(scope="module")
def stack():
    ids = np.random.default_rng(2).integers(0, 9, size=(40, 5))
    model = Stack()
    return model, jax.jit(model.init)(jax.random.key(0), ids), ids


@pytest.mark.slow
def test_a_stack_and_the_order_of_layers_by_the_oracle(stack):
    """Every layer sees what the rounded layers before it make, activations rounded as well."""
    model, variables, ids = stack
    rules = uniform_rules(3, 8)
    qparams = calibrate(model, variables, rules, [ids])
    rounded, _ = gptq(model, variables, qparams, [ids], act_order=False)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), rounded["params"])

    def rounds(x, quantizer):
        fields = (quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax)
        return _nearest(x, *(np.asarray(f, np.float64) for f in fields))

    def agrees(path, x, layer=None):
        weights, inputs = qparams[path]["weights"], qparams[path]["activations"]
        kernel, found = variables["params"], params
        for name in path.split("/"):
            kernel, found = kernel[name], found[name]
        kernel, bias, found = kernel["kernel"], found["bias"], found["kernel"]
        if layer is not None:
            kernel, bias, found = kernel[layer], bias[layer], found[layer]
            weights, inputs = (jax.tree.map(lambda a: a[layer], q) for q in (weights, inputs))
        x = [rounds(each, inputs) for each in x]
        whole = np.concatenate([each.reshape(-1, 6) for each in x])
        scale = np.broadcast_to(np.asarray(weights.scale, np.float64), kernel.shape)
        expected = _oracle(whole, np.asarray(kernel), scale, -4, 3, 0.01, False)
        assert (np.abs(found - expected) < 1e-5).mean() > 0.96, path
        return [each @ found + bias for each in x]

    table = params["table"]["embedding"]
    np.testing.assert_allclose(
        table, fake_quantize(variables["params"]["table"]["embedding"], qparams["table"]["weights"])
    )
    x = [table[ids]]
    # The layers of a stack are rounded together: the second one's inputs come from the float first.
    float_first = np.asarray(variables["params"]["layers"]["dense"]["kernel"][0], np.float64)
    agrees("layers/dense", x, 0)
    agrees("layers/dense", [x[0] + x[0] @ float_first], 1)
    for layer in range(2):
        one = lambda a, layer=layer: a[layer]
        own = jax.tree.map(one, qparams["layers/dense"]["activations"])
        dense = jax.tree.map(one, params["layers"]["dense"])
        x = [x[0] + rounds(x[0], own) @ dense["kernel"] + dense["bias"]]
    once = x[0] @ np.asarray(variables["params"]["shared"]["kernel"], np.float64)
    agrees("shared", [x[0], np.maximum(once, 0)])


def test_an_input_that_is_always_0_keeps_the_nearest():
    x = _correlated(50, 8)
    x[:, 3] = 0
    model, weight = nn.Dense(4, use_bias=False), RNG.normal(size=(8, 4)).astype(np.float32)
    qparams = calibrate(model, _dense(weight), uniform_rules(3, None), [x])
    rounded = gptq(model, _dense(weight), qparams, [x])[0]["params"]["kernel"]
    nearest = fake_quantize(weight, qparams[""]["weights"])
    np.testing.assert_array_equal(rounded[3], nearest[3])
    assert np.abs(rounded - nearest).max() > 0


@pytest.mark.slow
def test_another_width_and_another_format_do_not_leave_the_grid():
    x, weight = _correlated(80, 32), RNG.normal(size=(32, 6)).astype(np.float32)
    model = nn.Dense(6, use_bias=False)
    for spec in (
        TensorSpec(format="nf4", granularity="per_channel"),
        TensorSpec(format="mxfp4"),
        TensorSpec(bits=2, symmetric=False, granularity="per_channel"),
    ):
        rules = (QuantizationRule(path=".*", weights=spec),)
        qparams = calibrate(model, _dense(weight), rules, [x])
        rounded = np.asarray(gptq(model, _dense(weight), qparams, [x])[0]["params"]["kernel"])
        nearest = fake_quantize(weight, qparams[""]["weights"])
        np.testing.assert_array_equal(fake_quantize(rounded, qparams[""]["weights"]), rounded)
        assert _error(x, weight, rounded) < 0.8 * _error(x, weight, nearest)


def test_bad_input_is_refused():
    x, weight = _correlated(20, 4), RNG.normal(size=(4, 3)).astype(np.float32)
    model = nn.Dense(3, use_bias=False)
    qparams = calibrate(model, _dense(weight), uniform_rules(4, None), [x])
    run = lambda batches, qparams=qparams, **options: gptq(
        model, _dense(weight), qparams, batches, **options
    )
    with pytest.raises(ValueError, match="gptq got no batches"):
        run([])
    with pytest.raises(ValueError, match=r"damping=-1: expected 0 or more"):
        run([x], damping=-1)
    with pytest.raises(ValueError, match=r"block_size=0"):
        run([x], block_size=0)
    with pytest.raises(ValueError, match="qparams have"):
        run([x], {"other": qparams[""]})
    with pytest.raises(ValueError, match="NaN or infinity in the input of layer ''"):
        run([np.full_like(x, np.nan)])
    with pytest.raises(ValueError, match="singular with damping=0"):
        run([np.ones_like(x)], damping=0)
