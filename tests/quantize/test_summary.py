"""The summary against a table by hand, and its bytes against what a packed file holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from kdq.deploy import save_packed
from kdq.quantize import (
    MSE,
    Entropy,
    MinMax,
    QuantizationRule,
    TensorSpec,
    calibrate,
    list_layers,
    summary,
)
from kdq.quantize.network import Weights


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.MultiHeadDotProductAttention(2, name="attn")(nn.LayerNorm(name="norm")(x)), None


class Net(nn.Module):
    """Every way of being quantized, or of not being."""

    @nn.compact
    def __call__(self, tokens, train=False):
        x = nn.Embed(7, 8, name="embed")(tokens)
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(16, name="up")(x))
        x = nn.Dense(8, name="down")(nn.relu(x))
        x = nn.Conv(6, (3,), use_bias=False, name="conv")(x)
        return nn.Dense(5, name="head")(x * self.param("gain", nn.initializers.ones, (6,)))


PER_CHANNEL = {"granularity": "per_channel"}
RULES = (
    QuantizationRule(path="head"),
    QuantizationRule(path="embed", weights=TensorSpec(bits=8), activations=TensorSpec(bits=8)),
    QuantizationRule(
        path="layers/.*",
        weights=TensorSpec(bits=3, symmetric=False, observer=MinMax(), **PER_CHANNEL),
        activations=TensorSpec(bits=6, observer=Entropy(candidates=5)),
    ),
    QuantizationRule(
        path="up",
        weights=TensorSpec(format="nf4", granularity="per_group", group_size=4),
        activations=TensorSpec(bits=8, dynamic=True, granularity="per_token"),
    ),
    QuantizationRule(path="down", weights=TensorSpec(bits=1, observer=MSE(), **PER_CHANNEL)),
)

# What `list_layers` counts, for a stack of layers.
SAME = None
# path: weights, inputs, granularity, observer, MACs of one example
EXPECTED = {
    "embed": ("8", "", "per_tensor", "AbsMax()", 0),
    "layers/attn/query": (
        *("3", "6", "per_channel, per_tensor", "MinMax(), Entropy(candidates=5)"),
        SAME,
    ),
    "layers/attn/qk": ("", "6 × 6", "per_tensor", "Entropy(candidates=5)", SAME),
    "up": ("nf4", "8 dynamic", "per_group 4, per_token", "AbsMax()", 5 * 8 * 16),
    "down": ("1", "float", "per_channel", "MSE(candidates=100)", 5 * 16 * 8),
    "conv": ("float", "float", "", "", 5 * 3 * 8 * 6),
    "head": ("float", "float", "", "", 5 * 6 * 5),
}


@pytest.fixture(scope="module")
def net():
    tokens = jnp.arange(10).reshape(2, 5) % 7
    variables = jax.jit(Net().init)(jax.random.key(0), tokens)
    return Net(), variables, tokens, calibrate(Net(), variables, RULES, [tokens])


def test_rows_by_hand(net):
    model, variables, tokens, qparams = net
    by_rules = {row.path: row for row in summary(model, variables, RULES, tokens).rows}
    by_qparams = {row.path: row for row in summary(model, variables, qparams, tokens).rows}
    layers = list_layers(model, variables, tokens)
    assert list(by_rules) == list(by_qparams) == list(layers)
    for path, (weights, inputs, granularity, observer, macs) in EXPECTED.items():
        macs = layers[path].macs if macs is SAME else macs
        row = by_rules[path]
        shown = (row.weights, row.activations, row.granularity, row.observer, row.macs)
        assert shown == (weights, inputs, granularity, observer, macs), path
        row = by_qparams[path]
        shown = (row.weights, row.activations, row.granularity, row.observer, row.macs)
        assert shown == (weights, inputs, granularity, "", macs), path
    assert by_rules["layers/attn/out"].stack == (3,)
    assert by_rules["layers/attn/out"].weight_shape == (2, 4, 8)
    assert by_rules["embed"].input_shape == (2, 5)


def test_bytes_are_those_of_the_packed_file(net, tmp_path):
    model, variables, tokens, qparams = net
    path = tmp_path / "model.safetensors"
    size = save_packed(path, Weights(variables=variables, qparams=qparams), model={"name": "net"})
    arrays = safetensors.numpy.load_file(path)
    for given in (qparams, RULES):
        found = summary(model, variables, given, tokens)
        for row in found.rows:
            own = [v for k, v in arrays.items() if k.startswith(f"params/{row.path}/")]
            assert row.bytes == sum(v.nbytes for v in own), row.path
        assert found.bytes == sum(v.nbytes for v in arrays.values()) < size
        rest = variables["params"]["gain"].nbytes + sum(
            v.nbytes
            for tree in (
                variables["batch_stats"],
                variables["params"]["norm"],
                variables["params"]["layers"]["norm"],
            )
            for v in jax.tree.leaves(tree)
        )
        assert found.other_bytes == rest


def test_nothing_is_left_out_in_silence(net):
    model, variables, tokens, qparams = net
    by_rules, by_qparams = (summary(model, variables, g, tokens) for g in (RULES, qparams))
    assert by_rules.unreached == {
        "conv": "no rule matches",
        "head": "rule 'head' leaves it in float",
    }
    assert by_qparams.unreached == dict.fromkeys(("conv", "head"), "it has no quantizer")
    for found in (by_rules, by_qparams):
        assert list(found.unquantized) == ["layers/norm", "norm", ""]
        text = str(found)
        for path, reason in {**found.unquantized, **found.unreached}.items():
            assert f"\n  {path or chr(34) * 2}: {reason}" in text
    inputs_only = (QuantizationRule(path="embed|up", activations=TensorSpec(bits=8)),)
    unreached = summary(model, variables, inputs_only, tokens).unreached
    assert unreached["embed"] == "rule 'embed|up' leaves it in float"
    assert "up" not in unreached


def test_the_table_is_aligned():
    x = jnp.ones((3, 4))
    variables = {"params": {"kernel": jnp.ones((4, 600)), "bias": jnp.ones(600)}}
    rules = (QuantizationRule(path="", weights=TensorSpec(bits=4)),)
    assert str(summary(nn.Dense(600), variables, rules, x)).splitlines() == [
        "layer         kind   weight  input  weights  inputs  granularity  observer   MACs  bytes",
        '""            Dense  4×600   3×4    4        float   per_tensor   AbsMax()  2,400  3,604',
        "other arrays                                                                           0",
        "total                                                                       2,400  3,604",
        "",
        "quantized by no rule: nothing",
        "",
        "out of reach of rules: nothing",
    ]


@pytest.mark.parametrize("form", ["fp8_e4m3", "mxfp4", "nvfp4"])
def test_formats_have_their_names_from_either_side(form):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    variables = {"params": {"kernel": x.T @ x, "bias": jnp.ones(64)}}
    rules = (QuantizationRule(path="", weights=TensorSpec(format=form)),)
    qparams = calibrate(nn.Dense(64), variables, rules, [x])
    (by_rules,) = summary(nn.Dense(64), variables, rules, x).rows
    (by_qparams,) = summary(nn.Dense(64), variables, qparams, x).rows
    assert by_rules.weights == by_qparams.weights == form
    assert by_rules.granularity == by_qparams.granularity
    assert by_rules.bytes == by_qparams.bytes


def test_works_on_shapes_and_refuses_what_fits_no_layer(net):
    model, variables, tokens, qparams = net
    shapes = jax.eval_shape(lambda: (variables, tokens))
    assert summary(model, shapes[0], RULES, shapes[1]) == summary(model, variables, RULES, tokens)
    with pytest.raises(ValueError, match=r"qparams name \['tail'\]; the layers are \['embed'"):
        summary(model, variables, {"tail": qparams["up"]}, tokens)
    with pytest.raises(ValueError, match="'tail' matches no layer"):
        summary(model, variables, (QuantizationRule(path="tail"),), tokens)
