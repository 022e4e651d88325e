"""Tables of sizes against real files, and of latencies against tables that are known."""

import jax
import numpy as np
import pytest
import students

from kdq import deploy, models, quantize
from kdq.deploy.measure import latency
from kdq.quantize import MSE, as_network
from kdq.search import bank, measured
from kdq.search.cost import CostTable
from kdq.search.measured import METADATA, Files, fit_additive

CONFIG = {"name": "cnn", "num_classes": 5, "widths": (4, 6)}
CHOICES = {
    "conv_0": ("W2A8", "W4", "W8A8"),
    "conv_1": ("W2A8", "W4", ""),
    "head": ("W4", "W8A8"),
}


@pytest.fixture(scope="module")
def table():
    return measured.build(CONFIG, students.images(32, 0), CHOICES, ["size"])


@pytest.fixture(scope="module")
def trained():
    """Other weights than those that the table was made from, and their files."""
    model, variables = students.student()
    calibration = students.images(16, 5)
    filled = bank.fill(model, variables, CHOICES, [calibration], MSE())
    files = Files(as_network(model), variables, CHOICES, filled, calibration, CONFIG)
    return model, variables, calibration, files


def policies(count, seed=0):
    rng = np.random.default_rng(seed)
    return [{path: str(rng.choice(own)) for path, own in CHOICES.items()} for _ in range(count)]


def packed_bytes(trained, chosen, path, metadata=METADATA):
    """Of the file that an arm with these bits writes: calibrated at nothing else."""
    model, variables, calibration, _ = trained
    spec = lambda bits, granularity: quantize.TensorSpec(
        bits=bits, granularity=granularity, observer=MSE()
    )
    rules = []
    for layer, bits in chosen.items():
        w, a = bank.bits_of(bits)
        weights = spec(w, "per_channel") if w < 32 else None
        inputs = spec(a, "per_tensor") if a < 32 else None
        rules.append(quantize.QuantizationRule(path=layer, weights=weights, activations=inputs))
    qparams = quantize.calibrate(model, variables, rules, [calibration], check=False)
    image = calibration[:1]  # as the files of arms state it
    deploy.save_packed(path, variables, qparams, model=CONFIG, inputs=image, metadata=metadata)
    return path.stat().st_size


def test_sizes_of_a_table_are_those_of_files(table, trained, tmp_path):
    """Of another network's weights, to a few bytes of padding and of numbers as text."""
    found, real = [], []
    for chosen in policies(8):
        size = packed_bytes(trained, chosen, tmp_path / "model")
        assert trained[-1].size(chosen) == size
        found.append(table.total("size", chosen))
        real.append(size)
    np.testing.assert_allclose(found, real, rtol=0, atol=24)
    assert max(real) - min(real) > 200  # more than is allowed to be off


def test_a_table_says_what_it_is_of(table):
    assert table.model == CONFIG
    assert table.image_shape == (8, 8, 1)
    assert table.conditions == {}
    assert set(table.metrics) == {
        *("average_bits", "bops", "weight_memory", "activation_memory", "energy", "size")
    }
    variables = jax.eval_shape(
        models.build(**CONFIG).init, jax.random.key(0), students.images(1, 0)
    )
    weights = 9 * 4 + 9 * 4 * 6 + 6 * 5
    plain = models.count_parameters(variables) - weights
    assert table.total("weight_memory", {"conv_0": "W2A8", "conv_1": "", "head": "W8A8"}) == (
        pytest.approx(36 * 2 / 8 + 216 * 4 + 30 + 4 * plain)
    )


def total(choices, layers, constant, chosen):
    return constant + sum(layers[path][bits] for path, bits in chosen.items())


def test_an_additive_table_is_found_again():
    rng = np.random.default_rng(0)
    layers = {p: {b: float(rng.uniform(1, 5)) for b in own} for p, own in CHOICES.items()}
    tried = policies(25, seed=1)
    values = np.array([total(CHOICES, layers, 3.0, one) for one in tried])
    metric = fit_additive(CHOICES, tried, values)
    least = {path: min(own.values()) for path, own in layers.items()}
    assert metric.constant == pytest.approx(3.0 + sum(least.values()))
    for path, own in layers.items():
        for bits, value in own.items():
            assert metric.layers[path][bits] == pytest.approx(value - least[path], abs=1e-9)


def test_of_noisy_values_it_is_the_least_squares():
    rng = np.random.default_rng(0)
    tried = policies(40, seed=2)
    values = rng.uniform(1, 2, len(tried))
    metric = fit_additive(CHOICES, tried, values)
    table = CostTable(model={}, image_shape=(), metrics={"latency": metric})
    left = values - [table.total("latency", one) for one in tried]
    # What is left has nothing to do with any choice: the normal equations.
    assert left.sum() == pytest.approx(0, abs=1e-9)
    for path, own in CHOICES.items():
        for bits in own:
            assert left @ [one[path] == bits for one in tried] == pytest.approx(0, abs=1e-9)
    assert all(min(own.values()) == 0 for own in metric.layers.values())


def test_latencies_are_fitted_to_medians_and_tried_on_other_policies():
    """Times by a table that is known, in seconds, with a round that was disturbed."""
    rng = np.random.default_rng(0)
    layers = {p: {b: float(rng.uniform(1, 5)) for b in own} for p, own in CHOICES.items()}
    asked = []

    def time(tried):
        asked.extend(tried)
        clean = [1e-3 * total(CHOICES, layers, 2.0, one) for one in tried]
        return [np.array([seconds, seconds, 50 * seconds]) for seconds in clean]

    metric, error = measured._latencies(CHOICES, time)
    table = CostTable(model={}, image_shape=(), metrics={"latency": metric})
    assert error == pytest.approx(0, abs=1e-9)
    for one in policies(10, seed=9):  # milliseconds
        assert table.total("latency", one) == pytest.approx(total(CHOICES, layers, 2.0, one))
    # At least twice as many as there are numbers to find, and all layers alike at each choice.
    assert len(asked) > 2 * (1 + 2 + 2 + 1) + 5
    assert {path: CHOICES[path][-1] for path in CHOICES} in asked

    def disturbed(tried):
        found = time(tried)
        return [2 * one if i < measured.HELD_OUT else one for i, one in enumerate(found)]

    _, error = measured._latencies(CHOICES, disturbed)
    assert error == pytest.approx(0.5)


@pytest.mark.slow
def test_files_are_timed_in_a_runtime(trained):
    """One that does 64 times the work of the other takes longer."""
    pytest.importorskip("onnxruntime")
    chosen = {path: own[-1] for path, own in CHOICES.items()}
    how = {"runtime": "onnx", "cores": latency.cores(1), "rounds": 5}
    small = trained[-1].seconds([chosen, policies(1)[0]], batch=1, **how)
    large = trained[-1].seconds([chosen], batch=256, **how)
    assert [len(times) for times in small] == [5, 5]
    assert np.median(large[0]) > 2 * np.median(small[0])


@pytest.mark.slow
def test_a_table_of_latencies():
    pytest.importorskip("onnxruntime")
    choices = dict.fromkeys(CHOICES, ("W4A8", "W8A8"))
    table = measured.build(CONFIG, students.images(32, 0), choices, ["latency"], batch=4)
    assert set(table.metrics) >= {"latency"}
    assert "size" not in table.metrics
    assert (table.conditions["runtime"], table.conditions["batch"]) == ("onnx", 4)
    assert table.conditions["prediction_error"] >= 0
    chosen = {path: own[-1] for path, own in choices.items()}
    assert 0 < table.total("latency", chosen) < 100  # ms of 4 images of 64 pixels
