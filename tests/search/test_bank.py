"""What is chosen from a bank against what is calibrated at that choice alone."""

import jax
import numpy as np
import pytest
import students

from kdq import quantize
from kdq.experiment.quantized import OBSERVERS, _rule
from kdq.quantize import MSE, AbsMax
from kdq.search import bank


@pytest.fixture(scope="module")
def case():
    """`(model, variables, layers, calibration batches)` of a CNN."""
    model, variables = students.student()
    calibration = [students.images(16, seed) for seed in (0, 1)]
    layers = quantize.list_layers(model, variables, calibration[0])
    return model, variables, layers, calibration


@pytest.fixture(scope="module")
def unseen():
    """Likewise of a model with a stack, attention and tables."""
    model, calibration = students.Unseen(), [students.tokens(6, 0)]
    variables = jax.jit(model.init)(jax.random.key(0), calibration[0])
    layers = quantize.list_layers(model, variables, calibration[0])
    return model, variables, layers, calibration


def by_rules(model, variables, chosen, calibration, observer="mse"):
    """Calibrated by the rules that an arm gets for a policy, and by no other."""
    entries = bank.to_rules(chosen, observer)
    rules = tuple(_rule(entry, AbsMax(), "rules") for entry in entries)
    return quantize.calibrate(model, variables, rules, calibration, check=False)


def places(filled, choices, chosen):
    at = {path: np.int32(choices[path].index(bits)) for path, bits in chosen.items()}
    return bank.choose(filled, at)


def check(case, seeds, observer="mse"):
    model, variables, layers, calibration = case
    choices = dict.fromkeys(layers, students.CHOICES)
    filled = bank.fill(model, variables, choices, calibration, OBSERVERS[observer])
    differ = set()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        chosen = {path: str(rng.choice(students.CHOICES)) for path in layers}
        alone = by_rules(model, variables, chosen, calibration, observer)
        found = places(filled, choices, chosen)
        for path, own in alone.items():
            for operand, quantizer in own.items():
                jax.tree.map(np.testing.assert_array_equal, found[path][operand], quantizer)
        logits = [quantize.predict(model, variables, q, calibration[0]) for q in (alone, found)]
        reach = np.abs(logits[0]).max()
        np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-5 * reach)
        differ.add(float(logits[0].sum()))
    assert len(differ) == len(seeds)  # the policies are not all the same


def test_a_choice_is_what_is_calibrated_at_it_alone(case):
    check(case, range(1, 2))


def test_with_another_observer(case):
    check(case, range(1), observer="percentile")


@pytest.mark.slow
def test_of_a_stack_with_attention_and_tables(unseen):
    check(unseen, range(2))


@pytest.mark.parametrize("name", ["case", pytest.param("unseen", marks=pytest.mark.slow)])
def test_float_is_the_float_model(request, name):
    model, variables, layers, calibration = request.getfixturevalue(name)
    choices = dict.fromkeys(layers, ("W4A4", ""))
    filled = bank.fill(model, variables, choices, calibration, MSE())
    expected = model.apply(variables, calibration[0], train=False)
    reach = np.abs(expected).max()
    for place in (1, -1):
        found = bank.choose(filled, dict.fromkeys(layers, np.int32(place)))
        logits = quantize.predict(model, variables, found, calibration[0])
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * reach)
    four = bank.choose(filled, dict.fromkeys(layers, np.int32(0)))
    logits = quantize.predict(model, variables, four, calibration[0])
    assert np.abs(logits - expected).max() > 1e-3 * reach


def test_float_does_not_clip_what_calibration_has_not_seen(case):
    model, variables, layers, calibration = case
    choices = dict.fromkeys(layers, ("W4A4",))
    filled = bank.fill(model, variables, choices, calibration, MSE())
    found = bank.choose(filled, dict.fromkeys(layers, np.int32(-1)))
    larger = 5 * calibration[0]
    expected = model.apply(variables, larger, train=False)
    logits = quantize.predict(model, variables, found, larger)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_rules_say_the_bits_of_each_layer_and_escape_their_paths():
    chosen = {"a.b": "W2A8", "c": "W3", "d": "A4", "e": ""}
    rules = bank.to_rules(chosen, "mse")
    assert [rule["path"] for rule in rules] == [r"a\.b", "c", "d", "e"]
    weights = [rule.get("weights", {}).get("bits") for rule in rules]
    inputs = [rule.get("activations", {}).get("bits") for rule in rules]
    assert (weights, inputs) == ([2, 3, None, None], [8, None, 4, None])
    assert [bank.bits_of(bits) for bits in chosen.values()] == [(2, 8), (3, 32), (32, 4), (32, 32)]
