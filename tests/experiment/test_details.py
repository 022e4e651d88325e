"""What arms leave for their report adds up to what their records say."""

import json

import jax
import numpy as np
import pytest
from compilations import count_compilations

from kdq import config, deploy, experiment
from kdq.experiment import details
from kdq.quantize import grid
from kdq.tasks.classification import Classification

ARMS = ("teacher", "student", "ptq")


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    made = tiny_config()
    made["arms"] = {name: made["arms"][name] for name in ARMS}
    made["arms"]["ptq"]["ptq"] = ""
    made["arms"]["teacher"]["epochs"] = made["arms"]["student"]["epochs"] = 0.3
    workdir = tmp_path_factory.mktemp("details")
    with count_compilations("conv_general_dilated") as convolutions:
        records = experiment.run(config.freeze(made), workdir)
    assert not convolutions  # a network is only called inside compiled functions
    return workdir, {record.arm: record for record in records}


def of(workdir, arm):
    return json.loads((workdir / arm / "0" / details.FILE).read_text())


@pytest.mark.parametrize("arm", ARMS)
def test_confusions_and_bins_have_the_accuracy_and_the_ece_of_the_record(run, arm):
    workdir, records = run
    found, record = of(workdir, arm), records[arm]
    confusion = np.asarray(found["confusion"])
    assert np.trace(confusion) / confusion.sum() == pytest.approx(record.value("accuracy"))
    recall = np.diag(confusion) / confusion.sum(1)
    np.testing.assert_allclose(recall, record.accuracy_by_class)
    bins = {k: np.asarray(v, float) for k, v in found["reliability"].items()}
    assert bins["count"].sum() == confusion.sum()
    gap = np.nansum(bins["count"] * abs(bins["accuracy"] - bins["confidence"]))
    assert gap / confusion.sum() == pytest.approx(record.ece, abs=1e-3)


@pytest.mark.parametrize("arm", ARMS)
def test_layers_add_up_to_the_costs_of_the_record(run, arm):
    workdir, records = run
    layers, record = of(workdir, arm)["layers"], records[arm]
    for key in ("macs", "bops"):
        assert sum(layer[key] for layer in layers) == getattr(record, key)
    energy = sum(layer["energy_modelled_nj"] for layer in layers)
    assert energy == pytest.approx(record.energy_modelled_nj, rel=1e-3)
    assert sum(layer["weights"] for layer in layers) <= record.params
    for layer in layers:
        quantized = layer["weight_bits"] < 32
        assert (layer["sqnr_db"] is not None) == quantized
        assert (layer["sensitivity"] is not None) == quantized


def test_fewer_bits_are_noisier_and_move_the_outputs_more(run):
    workdir, _ = run
    layers = {layer["path"]: layer for layer in of(workdir, "ptq")["layers"]}
    # conv_0 is kept at 8 bits, conv_1 has 4: about 6 dB a bit.
    assert layers["conv_0"]["weight_bits"] == 8
    assert layers["conv_1"]["weight_bits"] == 4
    assert layers["conv_0"]["sqnr_db"] > layers["conv_1"]["sqnr_db"] + 12
    assert layers["conv_1"]["sensitivity"] > layers["conv_0"]["sensitivity"] > 0
    low, high = layers["conv_1"]["range"]  # after a ReLU
    assert low == 0
    assert high > 0


def test_maps_are_of_the_packed_model_on_the_first_test_examples(run):
    workdir, _ = run
    found = of(workdir, "ptq")["attributions"]
    packed = deploy.load_packed(workdir / "ptq" / "0" / "model.safetensors")
    images = np.asarray(found["images"], np.float32)[..., None]
    assert images.shape == (details.IMAGES, 8, 8, 1)
    logits = np.asarray(packed(images))
    assert logits.argmax(-1).tolist() == found["predicted"]
    # A pixel that is 0 after normalization has no part in gradient times input.
    maps = np.asarray(found["maps"])
    assert np.all(np.isfinite(maps))
    assert np.abs(maps).max() > 0


def test_ranges_are_what_codes_reach():
    quantizer = grid.from_range(-1.0, 3.0, 4, symmetric=False)
    low, high = details._range(quantizer)
    assert low <= -1.0 + 1e-6
    assert high >= 3.0 - 0.2
    assert high - low == pytest.approx(15 * float(quantizer.scale))
    dynamic = quantizer.replace(dynamic=grid.Dynamic(granularity="per_tensor"))
    assert details._range(dynamic) is None


def test_large_maps_become_means_of_blocks():
    maps = np.arange(2 * 70 * 65, dtype=float).reshape(2, 70, 65)
    small = np.asarray(details._small(maps))
    assert small.shape == (2, 23, 21)
    assert small[0, 0, 0] == maps[0, :3, :3].mean()
    assert np.asarray(details._small(maps[:, :8, :8])).shape == (2, 8, 8)


def test_confusions_leave_out_what_predicts_nothing():
    logits = np.array([[1.0, 0.0], [0.0, 2.0], [np.nan, 0.0]])
    scores = Classification().scores(logits, {"label": np.array([0, 0, 1])})
    assert details.confusion(jax.device_get(scores), 2) == [[1, 1], [0, 0]]
