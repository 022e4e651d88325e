"""What calibration makes of input that is not as it should be: an error, or a defined result."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdq.quantize import (
    MSE,
    AbsMax,
    Entropy,
    MinMax,
    MovingAverage,
    Percentile,
    QuantizationRule,
    TensorSpec,
    apply,
    calibrate,
    fake_quantize,
    uniform_rules,
)

OBSERVERS = (AbsMax(), MinMax(), MovingAverage(), Percentile(), MSE(20), Entropy(20))


class Tokens(nn.Module):
    """Integers in; a table is looked up, and multiplied by at the end."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(6, 4, name="embed")
        return embed.attend(nn.Dense(4, name="dense")(embed(tokens)))


def _draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _dense(rows=4, columns=8):
    return nn.Dense(columns), {
        "params": {"kernel": _draw(rows, columns), "bias": _draw(columns, seed=1)}
    }


def _rules(**specs):
    return (QuantizationRule(path=".*", **specs),)


@pytest.mark.parametrize("observer", OBSERVERS, ids=repr)
@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_is_refused_with_the_layer(observer, where):
    model, variables = _dense()
    x = _draw(5, 4)
    if where == "input":
        x = x.at[3, 2].set(jnp.nan)
    else:
        variables["params"]["kernel"] = variables["params"]["kernel"].at[0, 0].set(jnp.nan)
    spec = TensorSpec(bits=4, observer=observer)
    with pytest.raises(ValueError, match=f"NaN or infinity in the {where} of layer ''"):
        calibrate(model, variables, _rules(weights=spec, activations=spec), [_draw(5, 4), x])


@pytest.mark.parametrize("batches", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_data_is_refused(batches):
    model, variables = _dense()
    with pytest.raises(ValueError, match="calibrate got no batches: expected at least one"):
        calibrate(model, variables, uniform_rules(4, 4), batches)


@pytest.mark.parametrize("observer", OBSERVERS, ids=repr)
def test_an_all_zero_channel_quantizes_to_zeros(observer):
    """Of a weight, and of an input with a scale a channel."""
    model, variables = _dense()
    kernel = variables["params"]["kernel"].at[:, 3].set(0)
    variables = {"params": {"kernel": kernel, "bias": jnp.zeros(8)}}
    x = _draw(5, 4).at[:, 2].set(0)
    spec = TensorSpec(bits=4, granularity="per_channel", observer=observer)
    qparams = calibrate(model, variables, _rules(weights=spec, activations=spec), [x, 2 * x])
    outputs = np.asarray(apply(model, variables, qparams, x))
    assert np.isfinite(outputs).all()
    np.testing.assert_array_equal(outputs[:, 3], np.zeros(5))
    assert (np.abs(np.delete(outputs, 3, 1)).max(0) > 0).all()
    assert qparams[""]["activations"].scale[2] == 1
    assert qparams[""]["weights"].scale[0, 3] == 1


@pytest.mark.parametrize("observer", OBSERVERS, ids=repr)
@pytest.mark.parametrize("constant", [0.0, 2.5, -1.5])
def test_a_constant_activation_is_kept(observer, constant):
    """Exactly; half a step off for AbsMax on an affine grid, where it lies between two codes."""
    model, variables = _dense()
    x = jnp.full((5, 4), constant)
    for symmetric in (True, False):
        spec = TensorSpec(bits=4, symmetric=symmetric, observer=observer)
        quantizer = calibrate(model, variables, _rules(activations=spec), [x])[""]["activations"]
        exact = constant == 0 or symmetric or not isinstance(observer, AbsMax)
        slack = 1e-6 if exact else 0.5001 * float(quantizer.scale)
        np.testing.assert_allclose(fake_quantize(x, quantizer), x, atol=slack)


def test_integers_are_looked_up_and_only_the_table_is_rounded():
    tokens = jnp.arange(12).reshape(3, 4) % 6
    variables = {
        "params": {
            "embed": {"embedding": _draw(6, 4)},
            "dense": {"kernel": _draw(4, 4, seed=1), "bias": _draw(4, seed=2)},
        }
    }
    qparams = calibrate(Tokens(), variables, uniform_rules(4, 8), [tokens])
    # The query of `attend` is an input; the tokens are none.
    assert set(qparams["embed"]) == {"weights", "activations"}
    assert qparams["embed"]["weights"].scale.shape == (6, 1)
    assert np.isfinite(apply(Tokens(), variables, qparams, tokens)).all()

    table = {"params": variables["params"]["embed"]}
    rules = uniform_rules(4, 8)
    only = calibrate(nn.Embed(6, 4), table, rules, [tokens])
    assert set(only[""]) == {"weights"}
    rounded = np.float64(table["params"]["embedding"])
    scale = np.abs(rounded).max(1, keepdims=True) / 7
    expected = (np.round(rounded / scale) * scale)[np.asarray(tokens)]
    np.testing.assert_allclose(apply(nn.Embed(6, 4), table, only, tokens), expected, rtol=1e-5)
    # A rule for its inputs alone finds none.
    assert calibrate(nn.Embed(6, 4), table, uniform_rules(None, 8), [tokens]) == {}


def test_integers_into_a_dense_layer_are_numbers():
    model, variables = _dense()
    x = jnp.arange(20).reshape(5, 4) - 7
    qparams = calibrate(model, variables, uniform_rules(None, 8), [x])
    assert float(qparams[""]["activations"].scale) == pytest.approx(12 / 127)


@pytest.mark.parametrize("size", [3, 5, 8])
def test_groups_that_do_not_divide_are_refused_with_the_layer(size):
    model, variables = _dense()
    spec = TensorSpec(bits=4, granularity="per_group", group_size=size)
    message = f"layer '': group_size={size} does not divide its 4 inputs"
    with pytest.raises(ValueError, match=message):
        calibrate(model, variables, _rules(weights=spec), [_draw(5, 4)])
    dynamic = TensorSpec(bits=4, granularity="per_group", group_size=size, dynamic=True)
    message = f"layer '': group_size={size} does not divide its 4 channels"
    with pytest.raises(ValueError, match=message):
        calibrate(model, variables, _rules(activations=dynamic), [_draw(5, 4)])


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, True, "4"])
def test_bits_that_are_none_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits!r}: expected a whole number from 1 to 8"):
        TensorSpec(bits=bits)
    with pytest.raises(ValueError, match="expected a whole number from 1 to 8"):
        uniform_rules(4, bits)


def test_a_batch_of_another_shape_counts_too():
    """It compiles anew, and is not dropped."""
    model, variables = _dense()
    batches = [_draw(5, 4), 10 * _draw(3, 4, seed=3)]
    qparams = calibrate(model, variables, uniform_rules(None, 8), batches)
    scale = np.abs(batches[1]).max() / 127
    np.testing.assert_allclose(qparams[""]["activations"].scale, scale, rtol=1e-6)
