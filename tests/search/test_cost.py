"""Costs by hand."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import students

from kdq import files, models, quantize
from kdq.config import ConfigError, parse_bits
from kdq.deploy.measure import energy
from kdq.quantize import QuantizationRule, TensorSpec, layers
from kdq.search import cost
from kdq.search.cost import CostTable

# conv_0: 8×8 positions, 3×3 kernel, 1 -> 4 channels; conv_1 strides to 4×4, 4 -> 6; head 6 -> 10.
CONV_0 = 8 * 8 * 3 * 3 * 1 * 4
CONV_1 = 4 * 4 * 3 * 3 * 4 * 6
HEAD = 6 * 10


@pytest.fixture(scope="module")
def student():
    model = models.build("cnn", num_classes=10, widths=(4, 6))
    images = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    return model, variables, images, quantize.list_layers(model, variables, images)


def calibrated(student, rules):
    model, variables, images, _ = student
    return quantize.calibrate(model, variables, rules, [images], check=False)


def test_macs(student):
    assert cost.macs(student[-1]) == CONV_0 + CONV_1 + HEAD


def test_bops_of_a_float_model(student):
    assert cost.bops(student[-1], {}) == (CONV_0 + CONV_1 + HEAD) * 32 * 32


def test_bops_of_mixed_bits(student):
    spec = lambda bits, **more: TensorSpec(bits=bits, **more)
    rules = (
        QuantizationRule(path="conv_0", weights=spec(8), activations=spec(8)),
        QuantizationRule(path="conv_1", weights=spec(3, narrow=True), activations=spec(5)),
        QuantizationRule(path="head", weights=spec(1)),
    )
    qparams = calibrated(student, rules)
    assert {path: layers.layer_bits(qparams, path) for path in student[-1]} == {
        "conv_0": (8, 8),
        "conv_1": (3, 5),
        "head": (1, 32),
    }
    expected = CONV_0 * 8 * 8 + CONV_1 * 3 * 5 + HEAD * 1 * 32
    assert cost.bops(student[-1], qparams) == expected


def test_a_layer_without_a_rule_counts_as_float(student):
    qparams = calibrated(
        student, (QuantizationRule(path="conv_1", activations=TensorSpec(bits=2)),)
    )
    assert layers.layer_bits(qparams, "conv_1") == (32, 2)
    expected = (CONV_0 + HEAD) * 32 * 32 + CONV_1 * 32 * 2
    assert cost.bops(student[-1], qparams) == expected


def test_a_layer_that_runs_twice_costs_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3, name="dense")
            return dense(dense(x))

    inputs = jnp.ones((2, 3))
    variables = jax.jit(Twice().init)(jax.random.key(0), inputs)
    layers = quantize.list_layers(Twice(), variables, inputs)
    assert cost.macs(layers) == 2 * 9
    assert cost.bops(layers, {}) == 2 * 9 * 32 * 32


# Tables.

CHOICES = {
    "conv_0": ("W2A8", "W8A8"),
    "conv_1": ("W3", "A4", "W8A8"),
    "head": ("W2A2", "W4A4"),
}
WEIGHTS = {"conv_0": 9 * 4, "conv_1": 9 * 4 * 6, "head": 60}
MOVED = {"conv_0": 64 + 4 * 64, "conv_1": 4 * 64 + 6 * 16, "head": 6 + 10}


def table_of(layers, choices, parameters, **fields):
    metrics = cost.counted(layers, choices, parameters)
    return CostTable(model={"name": "cnn"}, image_shape=(8, 8, 1), metrics=metrics, **fields)


@pytest.fixture(scope="module")
def table(student):
    return table_of(student[-1], CHOICES, models.count_parameters(student[1]))


def test_a_table_by_hand(table):
    chosen = {"conv_0": "W2A8", "conv_1": "W3", "head": "W4A4"}
    weights = sum(WEIGHTS.values())
    bits = 36 * 2 + 216 * 3 + 60 * 4
    assert table.total("average_bits", chosen) == pytest.approx(bits / weights)
    assert table.total("bops", chosen) == CONV_0 * 16 + CONV_1 * 3 * 32 + HEAD * 16
    biases = 4 + 6 + 10
    assert table.total("weight_memory", chosen) == pytest.approx(bits / 8 + 4 * biases)
    # Where inputs and outputs are most: conv_1's inputs are float, so it beats conv_0.
    assert MOVED["conv_1"] * 4 > MOVED["conv_0"]
    assert table.total("activation_memory", chosen) == MOVED["conv_1"] * 4
    chosen["conv_1"] = "A4"
    assert table.total("activation_memory", chosen) == MOVED["conv_0"]
    assert table.total("bops", chosen) == CONV_0 * 16 + CONV_1 * 32 * 4 + HEAD * 16


def of_bits(layers, chosen):
    """Quantizers of which nothing but the bits is looked at."""
    found = {}
    for path, choice in chosen.items():
        bits = dict(zip(("weights", "activations"), parse_bits(choice), strict=True))
        layer = layers[path]
        operands = [*(["weights"] if layer.weight_name else []), *layer.operands]
        own = {}
        for operand in operands:
            width = bits["weights" if operand == "weights" else "activations"]
            if width:
                spec = TensorSpec(bits=width)
                own[operand] = grid_of(spec)
        if own:
            found[path] = own
    return found


def grid_of(spec):
    model = nn.Dense(1)
    variables = {"params": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}
    rules = (QuantizationRule(path=".*", weights=spec),)
    return quantize.calibrate(model, variables, rules, [jnp.ones((1, 1))], check=False)[""][
        "weights"
    ]


def check_against_quantizers(layers, choices, policies):
    """Costs of a table are those of the model with the quantizers of the policy."""
    table = table_of(layers, choices, 10**5)
    for chosen in policies:
        qparams = of_bits(layers, chosen)
        assert table.total("bops", chosen) == cost.bops(layers, qparams)
        modelled = sum(one.total for one in energy.modelled(layers, qparams).values())
        assert table.total("energy", chosen) >= modelled * (1 - 1e-9)
    last = {path: own[-1] for path, own in choices.items()}
    modelled = sum(one.total for one in energy.modelled(layers, of_bits(layers, last)).values())
    assert table.total("energy", last) == pytest.approx(modelled, rel=1e-9)


def test_costs_are_those_of_the_quantizers(student):
    rng = np.random.default_rng(0)
    policies = [{p: str(rng.choice(own)) for p, own in CHOICES.items()} for _ in range(8)]
    choices = {path: (*own[:-1], "W8A8") for path, own in CHOICES.items()}
    policies = [p for p in policies if p["head"] != "W4A4"]
    assert len(policies) > 1
    check_against_quantizers(student[-1], choices, policies)


def test_energy_is_at_most_too_much_where_a_smaller_memory_would_do():
    """Weights of 8 bits need a larger memory than those of 2: the table is made for the first."""
    model = models.build("mlp", num_classes=10, widths=(128, 128))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64)))
    layers = quantize.list_layers(model, variables, jax.ShapeDtypeStruct((1, 64), jnp.float32))
    choices = dict.fromkeys(layers, ("W2A8", "W8A8"))
    table = table_of(layers, choices, models.count_parameters(variables))
    low = dict.fromkeys(layers, "W2A8")
    modelled = sum(one.total for one in energy.modelled(layers, of_bits(layers, low)).values())
    assert table.total("energy", low) > 1.01 * modelled


def test_products_of_activations_and_tables_that_are_looked_up():
    """Neither has what a choice says: a product no weight, a lookup no input to quantize."""
    model = students.Unseen()
    tokens = jnp.asarray(students.tokens(2, 0))
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    layers = quantize.list_layers(model, variables, tokens)
    assert "layers/attention/qk" in layers
    choices = dict.fromkeys(layers, ("W2A4", "A4", "W4", "W8A8"))
    rng = np.random.default_rng(0)
    policies = [{p: str(rng.choice(own)) for p, own in choices.items()} for _ in range(4)]
    policies += [dict.fromkeys(layers, "W2A4"), dict.fromkeys(layers, "W4")]
    check_against_quantizers(layers, choices, policies)


def test_a_table_is_read_as_it_was_written(table, tmp_path):
    measured = dataclasses.replace(
        table,
        conditions={"device": "this", "cores": (0, 1), "prediction_error": 0.25},
        versions={"jax": "1"},
    )
    measured.save(tmp_path / "costs.json")
    assert cost.load(tmp_path / "costs.json", device="this") == measured
    other = cost.load(tmp_path / "costs.json", device="that", other_device=True)
    assert other == measured
    message = r"was measured on 'this', and this is 'that'.*config\.search\.other_device=True"
    with pytest.raises(ConfigError, match=message):
        cost.load(tmp_path / "costs.json", device="that")


def test_what_was_only_counted_is_of_any_device(table, tmp_path):
    table.save(tmp_path / "costs.json")
    assert cost.load(tmp_path / "costs.json", device="any") == table


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "is no cost table: "),
        (lambda text: "[]", r"costs\.json=\[\]: expected a mapping"),
        (lambda text: text.replace('"worst"', '"wurst"', 1), "'wurst'.*'worst'"),
        (lambda text: text.replace("image_shape", "shape"), "'shape'"),
        (lambda text: None, r"costs\.json can't be read: No such file"),
    ],
)
def test_a_spoiled_table_is_refused(table, tmp_path, spoil, message):
    path = tmp_path / "costs.json"
    table.save(path)
    # Without its seal, as one that was made by hand.
    spoiled = spoil(json.dumps(files.read_json(path)))
    path.unlink()
    if spoiled is not None:
        path.write_text(spoiled)
    with pytest.raises(ConfigError, match=message):
        cost.load(path, device="any")
