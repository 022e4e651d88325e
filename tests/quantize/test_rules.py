"""Rules: which one wins, what each scale's shape is, and what is refused."""

import re

import pytest

from kdq.quantize import MSE, LayerInfo, QuantizationRule, TensorSpec, uniform_rules
from kdq.quantize.rules import activation_scale_shape, match, weight_scale_shape


def _layer(path, weight_shape):
    return LayerInfo(
        path=path,
        kind="Dense" if len(weight_shape) == 2 else "Conv",
        weight_name="kernel",
        weight_shape=weight_shape,
        input_shape=(2, 9, 9, 24),
        output_shape=(2, 9, 9, weight_shape[-1]),
        macs=1,
    )


LAYERS = {
    path: _layer(path, shape)
    for path, shape in {
        "conv_0": (3, 3, 1, 8),
        "block/conv_1": (3, 3, 8, 12),
        "head": (12, 10),
    }.items()
}


def _spec(bits, **kwargs):
    return TensorSpec(bits=bits, **kwargs)


def _rule(path, bits=4, **kwargs):
    return QuantizationRule(path=path, weights=_spec(bits, **kwargs))


def test_first_match_wins_over_whole_paths_in_layer_order():
    rules = (_rule("head", 8), _rule(".*conv_1", 3), _rule(".*", 2))
    bits = {path: rule.weights.bits for path, rule in match(rules, LAYERS).items()}
    assert bits == {"conv_0": 2, "block/conv_1": 3, "head": 8}
    assert list(bits) == list(LAYERS)
    reversed_bits = {p: r.weights.bits for p, r in match(rules[::-1], LAYERS).items()}
    assert set(reversed_bits.values()) == {2}


def test_a_layer_that_no_rule_matches_is_left_out():
    assert list(match((_rule("conv_0"),), LAYERS)) == ["conv_0"]
    assert match((), LAYERS) == {}


@pytest.mark.parametrize("path", ["conv", "onv_0", "conv_1", "Head", "block"])
def test_a_rule_that_fits_no_whole_path_names_the_layers(path):
    with pytest.raises(ValueError, match=re.escape(f"{path!r} matches no layer")) as error:
        match((_rule(".*"), _rule(path)), LAYERS)
    assert all(repr(layer) in str(error.value) for layer in LAYERS)


def test_a_group_size_that_does_not_divide_names_the_layer_and_both_numbers():
    spec = {"granularity": "per_group", "group_size": 4}
    rules = (_rule("conv_0"), _rule(".*", **spec))
    assert match(rules, LAYERS)["head"].weights.group_size == 4
    with pytest.raises(ValueError, match=r"layer 'conv_0': group_size=4 .* 1 inputs"):
        match((_rule(".*", **spec),), LAYERS)
    with pytest.raises(ValueError, match=r"layer 'head': group_size=24 .* 12 inputs"):
        match((_rule("head", granularity="per_group", group_size=24),), LAYERS)


@pytest.mark.parametrize("bits", [0, 9, -1, True, 2.5, 4.0, "4"])
def test_bits_are_whole_numbers_from_1_to_8(bits):
    with pytest.raises(ValueError, match=re.escape(f"bits={bits!r}: expected a whole number")):
        _spec(bits)
    assert [_spec(b).bits for b in (1, 8)] == [1, 8]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "per_row"}, r"'per_row': expected one of .*per_channel"),
        ({"granularity": "per_group"}, "group_size=None"),
        ({"group_size": 4}, "group_size=4 with granularity='per_tensor'"),
        ({"granularity": "per_group", "group_size": 0}, "group_size=0: expected at least 1"),
        ({"narrow": True, "signed": False}, "narrow=True"),
        ({"narrow": True, "symmetric": False}, "narrow=True"),
    ],
)
def test_options_that_contradict_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        _spec(4, **fields)


def test_rules_refuse_a_broken_pattern_and_groups_of_activations():
    with pytest.raises(ValueError, match=r"'conv_\(' is no regular expression"):
        _rule("conv_(")
    with pytest.raises(ValueError, match=r"rule 'head': per_group activations need dynamic"):
        QuantizationRule(path="head", activations=_spec(8, granularity="per_group", group_size=4))


def test_scale_shapes():
    conv, head = LAYERS["block/conv_1"], LAYERS["head"]
    grouped = _spec(4, granularity="per_group", group_size=2)
    assert weight_scale_shape(_spec(4), conv) == (1, 1, 1, 1)
    assert weight_scale_shape(_spec(4, granularity="per_channel"), conv) == (1, 1, 1, 12)
    assert weight_scale_shape(grouped, conv) == (1, 1, 4, 12)
    assert weight_scale_shape(grouped, head) == (6, 10)
    assert activation_scale_shape(_spec(8), conv, "activations") == ()
    assert activation_scale_shape(_spec(8, granularity="per_channel"), conv, "activations") == (24,)


def test_uniform_rules_keep_some_layers_at_other_bits():
    rules = uniform_rules(4, 3, keep=("conv_0", "head"), keep_bits=8, observer=MSE())
    found = match(rules, LAYERS)
    bits = {p: (r.weights.bits, r.activations.bits) for p, r in found.items()}
    assert bits == {"conv_0": (8, 8), "block/conv_1": (4, 3), "head": (8, 8)}
    for rule in found.values():
        assert (rule.weights.granularity, rule.activations.granularity) == (
            "per_channel",
            "per_tensor",
        )
        assert rule.weights.observer == rule.activations.observer == MSE()


def test_uniform_rules_leave_a_half_in_float_for_kept_layers_too():
    weight_only = match(uniform_rules(4, None, keep=("head",)), LAYERS)
    assert {p: (r.weights.bits, r.activations) for p, r in weight_only.items()} == {
        "conv_0": (4, None),
        "block/conv_1": (4, None),
        "head": (8, None),
    }
    for rule in match(uniform_rules(None, 5, keep=("head",)), LAYERS).values():
        assert rule.weights is None
        assert rule.activations.bits == (8 if rule.path == "head" else 5)
    with pytest.raises(ValueError, match="bits=9"):
        uniform_rules(9, 4)
