"""Calibration against ranges worked out by hand in float64."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from kdq.quantize import (
    MSE,
    AbsMax,
    MinMax,
    MovingAverage,
    Percentile,
    QuantizationRule,
    TensorSpec,
    apply,
    calibrate,
    uniform_rules,
)

CALLS = []


class Mlp(nn.Module):
    """Two layers; the second sees the output of a ReLU. Counts how often it is traced."""

    @nn.compact
    def __call__(self, x):
        CALLS.append(x.shape)
        return nn.Dense(6, name="second")(nn.relu(nn.Dense(8, name="first")(x)))


def _variables(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {
        "params": {
            "first": {"kernel": draw(4, 8), "bias": draw(8)},
            "second": {"kernel": draw(8, 6), "bias": draw(6)},
        }
    }


def _batches(n=2):
    rng = np.random.default_rng(1)
    return [(k + 1) * rng.normal(size=(5, 4)).astype(np.float32) for k in range(n)]


def _inputs(variables, batches):
    """What each layer sees, over all batches, in float64."""
    x = np.concatenate(batches).astype(np.float64)
    first = variables["params"]["first"]
    hidden = np.maximum(x @ first["kernel"].astype(np.float64) + first["bias"], 0)
    return {"first": x, "second": hidden}


def _rules(weights=None, activations=None, path=".*"):
    return (QuantizationRule(path=path, weights=weights, activations=activations),)


def _assert_quantizer(quantizer, scale, zero_point, qmin, qmax):
    assert (quantizer.levels, quantizer.dynamic, quantizer.scale_format) == (None, None, "")
    assert quantizer.scale.shape == np.shape(scale)
    assert quantizer.zero_point.shape == np.shape(scale)
    np.testing.assert_allclose(quantizer.scale, scale, rtol=1e-5)
    np.testing.assert_array_equal(
        quantizer.zero_point, np.broadcast_to(zero_point, np.shape(scale))
    )
    assert (quantizer.qmin, quantizer.qmax) == (qmin, qmax)


def test_two_batches_by_hand():
    variables, batches = _variables(), _batches()
    weights = TensorSpec(bits=4, granularity="per_channel")
    qparams = calibrate(Mlp(), variables, _rules(weights, TensorSpec(bits=8)), batches)
    assert list(qparams) == ["first", "second"]
    inputs = _inputs(variables, batches)
    for path in qparams:
        kernel = variables["params"][path]["kernel"].astype(np.float64)
        scale = np.abs(kernel).max(0, keepdims=True) / 7
        _assert_quantizer(qparams[path]["weights"], scale, 0, -8, 7)
    # The image has both signs; a ReLU's output has not, so its codes are unsigned.
    reach = {path: np.abs(x).max() for path, x in inputs.items()}
    _assert_quantizer(qparams["first"]["activations"], reach["first"] / 127, 0, -128, 127)
    _assert_quantizer(qparams["second"]["activations"], reach["second"] / 255, 0, 0, 255)
    # Both batches count, and the first is not the larger one.
    assert reach["second"] > 1.5 * _inputs(variables, batches[:1])["second"].max()


def test_batches_may_come_from_a_generator_once():
    expected = calibrate(Mlp(), _variables(), uniform_rules(4, 8), _batches(3))
    given = calibrate(Mlp(), _variables(), uniform_rules(4, 8), (b for b in _batches(3)))
    jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_affine_and_forced_signs_by_hand():
    variables, batches = _variables(), _batches()
    affine = TensorSpec(bits=5, symmetric=False, observer=MinMax())
    qparams = calibrate(Mlp(), variables, _rules(affine, affine), batches)
    tensors = {
        **{(path, "activations"): x for path, x in _inputs(variables, batches).items()},
        **{(p, "weights"): variables["params"][p]["kernel"] for p in ("first", "second")},
    }
    for (path, name), tensor in tensors.items():
        scale = (tensor.max() - tensor.min()) / 31
        shape = (1, 1) if name == "weights" else ()
        zero_point = np.round(-tensor.min() / scale)
        _assert_quantizer(qparams[path][name], np.full(shape, scale), zero_point, 0, 31)
    signed = TensorSpec(bits=5, signed=True, narrow=True)
    second = calibrate(Mlp(), variables, _rules(None, signed), batches)["second"]
    reach = _inputs(variables, batches)["second"].max()
    _assert_quantizer(second["activations"], reach / 15, 0, -15, 15)


def test_groups_of_weights_and_channels_of_activations_by_hand():
    variables, batches = _variables(), _batches()
    weights = TensorSpec(bits=3, granularity="per_group", group_size=4)
    activations = TensorSpec(bits=8, granularity="per_channel", signed=True)
    qparams = calibrate(Mlp(), variables, _rules(weights, activations, "second"), batches)
    assert list(qparams) == ["second"]
    kernel = variables["params"]["second"]["kernel"]
    scale = np.abs(kernel.reshape(2, 4, 6)).max(1) / 3
    _assert_quantizer(qparams["second"]["weights"], scale, 0, -4, 3)
    scale = _inputs(variables, batches)["second"].max(0) / 127
    _assert_quantizer(qparams["second"]["activations"], scale, 0, -128, 127)


def test_a_shared_layer_sees_the_inputs_of_all_its_calls():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, use_bias=False, name="layer")
            return layer(10 * layer(x))

    x = _batches(1)[0]
    variables = {"params": {"layer": {"kernel": 2 * np.eye(4, dtype=np.float32)}}}
    qparams = calibrate(Shared(), variables, uniform_rules(None, 8), [x])
    _assert_quantizer(qparams["layer"]["activations"], 20 * np.abs(x).max() / 127, 0, -128, 127)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_an_all_zero_channel_gives_zeros(bits):
    variables = _variables()
    variables["params"]["first"]["kernel"][:, 3] = 0
    variables["params"]["first"]["bias"][3] = 0
    qparams = calibrate(Mlp(), variables, uniform_rules(bits, None), _batches())
    model = nn.Dense(8)
    first = {"params": variables["params"]["first"]}
    outputs = np.asarray(apply(model, first, {"": qparams["first"]}, _batches()[0]))
    assert np.isfinite(outputs).all()
    np.testing.assert_array_equal(outputs[:, 3], np.zeros(5))
    assert (np.abs(np.delete(outputs, 3, axis=1)).max(0) > 0).all()


@pytest.mark.parametrize("observer", [AbsMax(), MinMax(), MovingAverage(), Percentile(), MSE()])
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_constant_activation_is_exact(observer, constant):
    batches = [np.full((5, 4), constant, np.float32)] * 2
    variables = {"params": _variables()["params"]["first"]}
    qparams = calibrate(nn.Dense(8), variables, uniform_rules(None, 4, observer=observer), batches)
    outputs = apply(nn.Dense(8), variables, qparams, batches[0])
    expected = nn.Dense(8).apply(variables, batches[0])
    np.testing.assert_allclose(outputs, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("observer", [AbsMax(), MovingAverage(), MSE()], ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_with_the_layer(observer, bad):
    batches = _batches()
    batches[0][2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity in the input of layer 'first'"):
        calibrate(Mlp(), _variables(), uniform_rules(None, 8, observer=observer), batches)
    rules = _rules(None, TensorSpec(bits=8, observer=observer), "second")
    with pytest.raises(ValueError, match="NaN or infinity in the input of layer 'second'"):
        calibrate(Mlp(), _variables(), rules, batches)
    variables = _variables()
    variables["params"]["second"]["kernel"][0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinity in the weight of layer 'second'"):
        calibrate(Mlp(), variables, uniform_rules(4, None, observer=observer), _batches())


def test_no_batches_and_a_rule_without_a_layer_are_refused():
    with pytest.raises(ValueError, match="calibrate got no batches"):
        calibrate(Mlp(), _variables(), uniform_rules(4, 8), [])
    with pytest.raises(ValueError, match=r"'third' matches no layer.*'first', 'second'"):
        calibrate(Mlp(), _variables(), uniform_rules(4, 8, keep=("third",)), _batches())


def _nearest_error(tensor, quantizer):
    """Squared error of the nearest points of the grid, in float64."""
    scale, zero_point, qmin, qmax = (
        float(np.squeeze(getattr(quantizer, k))) for k in ("scale", "zero_point", "qmin", "qmax")
    )
    points = (np.arange(qmin, qmax + 1) - zero_point) * scale
    return np.square(np.asarray(tensor, np.float64).reshape(-1, 1) - points).min(-1).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("draw", ["normal", "standard_cauchy", "uniform", "exponential", "outlier"])
def test_mse_is_never_worse_than_absmax(draw, bits):
    rng = np.random.default_rng(bits)
    if draw == "outlier":
        kernel = np.append(rng.normal(size=31), 40.0).reshape(4, 8)
    else:
        kernel = getattr(rng, draw)(size=(4, 8))
    variables = {"params": {"kernel": kernel.astype(np.float32), "bias": np.zeros(8, np.float32)}}
    errors = {}
    for observer in (AbsMax(), MSE()):
        spec = TensorSpec(bits=bits, observer=observer)
        qparams = calibrate(nn.Dense(8), variables, _rules(spec), _batches(1))
        errors[type(observer)] = _nearest_error(
            variables["params"]["kernel"], qparams[""]["weights"]
        )
    assert errors[MSE] <= errors[AbsMax] * (1 + 1e-5)
    if (bits, draw) == (2, "normal"):  # there it pays
        assert errors[MSE] < 0.9 * errors[AbsMax]


def test_mse_is_never_worse_than_absmax_for_activations():
    """Beyond the width of a bin, which is all that the histogram does not know."""
    variables, batches = _variables(), _batches(4)
    inputs = _inputs(variables, batches)
    for bits in (2, 4, 6):
        found = {
            type(observer): calibrate(
                Mlp(), variables, uniform_rules(None, bits, observer=observer), batches
            )
            for observer in (AbsMax(), MSE())
        }
        for path, x in inputs.items():
            errors = {k: _nearest_error(x, v[path]["activations"]) for k, v in found.items()}
            assert errors[MSE] <= errors[AbsMax] * 1.01
            assert bits > 2 or errors[MSE] < 0.9 * errors[AbsMax]


def test_one_compilation_serves_every_bit_width():
    variables, batches = _variables(seed=5), _batches(3)
    model = Mlp(name="counted")  # its own cache entry
    observer = Percentile(97.0)
    CALLS.clear()
    calibrate(model, variables, uniform_rules(8, 8, observer=observer), batches)
    first = len(CALLS)
    for bits in range(1, 8):
        calibrate(model, variables, uniform_rules(bits, bits, observer=observer), batches)
    # The list of layers, the observation of three batches, and the float and the quantized model of
    # the check were traced once each.
    assert len(CALLS) == first == 4
