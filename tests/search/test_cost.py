"""Costs by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from kdq import models, quantize
from kdq.quantize import QuantizationRule, TensorSpec, layers
from kdq.search import cost

# conv_0: 8×8 positions, 3×3 kernel, 1 -> 4 channels; conv_1 strides to 4×4, 4 -> 6; head 6 -> 10.
CONV_0 = 8 * 8 * 3 * 3 * 1 * 4
CONV_1 = 4 * 4 * 3 * 3 * 4 * 6
HEAD = 6 * 10


@pytest.fixture(scope="module")
def student():
    model = models.build("cnn", num_classes=10, widths=(4, 6))
    images = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    return model, variables, images, quantize.list_layers(model, variables, images, train=False)


def calibrated(student, rules):
    model, variables, images, _ = student
    return quantize.calibrate(model, variables, rules, [images], train=False)


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
    variables = Twice().init(jax.random.key(0), inputs)
    layers = quantize.list_layers(Twice(), variables, inputs)
    assert cost.macs(layers) == 2 * 9
    assert cost.bops(layers, {}) == 2 * 9 * 32 * 32
