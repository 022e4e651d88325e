"""Files of arms for runtimes: made with the arms, made again, and those that fail."""

import dataclasses
import json

import numpy as np
import pytest

from kdq import config, deploy, experiment


def by_arm(records):
    return {record.arm: record for record in records}


@pytest.mark.slow
def test_files_that_are_there_are_timed_again_beside_new_ones(tiny_config, copied):
    pytest.importorskip("jax2onnx")

    def run(**export):
        frozen = config.freeze({**tiny_config(), "export": export})
        return by_arm(experiment.run(frozen, copied, arms=["student"]))["student"].exports

    first = run(formats=("packed",), examples=100)
    assert set(first["packed"]) > {"accuracy", "sha256"}
    assert "latency" not in first["packed"]
    formats = ("packed", "stablehlo")
    both = run(formats=formats, examples=100, latency_batches=(1,))
    assert both["packed"]["accuracy"] == first["packed"]["accuracy"]
    assert {name: entry["recommended"] for name, entry in both.items()} == {
        "packed": False, "stablehlo": True,
    }  # fmt: skip
    assert all(entry["latency"]["1"]["milliseconds"] > 0 for entry in both.values())
    again = run(formats=formats, examples=100, latency_batches=(1,))
    assert again == json.loads(json.dumps(both))  # nothing was left to do


def test_sums_are_multiplied_by_fixed_point_numbers_if_the_config_says_so(tiny_config, copied):
    def run(**export):
        export = {"formats": ("stablehlo",), "examples": 50, "agreement": 0.5, **export}
        frozen = config.freeze({**tiny_config(), "export": export})
        return by_arm(experiment.run(frozen, copied, arms=["ptq"]))["ptq"].exports["stablehlo"]

    fixed, folder = run(fixed_point=True), copied / "ptq" / "0"
    assert fixed["fixed_point"]
    packed = deploy.load_packed(folder / "model.safetensors")
    shape = packed.inputs[0].shape[1:]
    images = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    outputs = deploy.load_stablehlo(folder / "export" / "model.stablehlo")(images)
    np.testing.assert_array_equal(outputs, packed.lower(images, fixed_point=True)(images))
    by_float = run()  # it is made anew
    assert "fixed_point" not in by_float
    assert by_float["sha256"] != fixed["sha256"]


@pytest.mark.slow
def test_an_export_that_fails_keeps_no_other_from_being_made(tiny_config, copied, monkeypatch):
    def save(path, source):
        raise ValueError("no words for it")

    broken = dataclasses.replace(deploy.FORMATS["stablehlo"], save=save, file="broken")
    monkeypatch.setitem(deploy.FORMATS, "broken", broken)

    def run(*formats):
        export = {"formats": formats, "examples": 50, "arms": ("teacher", "student")}
        frozen = config.freeze({**tiny_config(), "export": export})
        return experiment.run(frozen, copied, arms=["teacher", "student"])

    expected = (
        r"^teacher, seed 0, broken: format 'broken': no words for it; "
        r"student, seed 0, broken: format 'broken': no words for it$"
    )
    for _ in range(2):  # it is tried again each time
        with pytest.raises(deploy.ExportError, match=expected):
            run("broken", "packed")
    for arm in ("teacher", "student"):
        record = json.loads((copied / arm / "0" / "result.json").read_text())
        assert set(record["exports"]) == {"packed"}
        assert record["exports"]["packed"]["accuracy"] == pytest.approx(
            record["metrics"]["test"]["accuracy"]
        )
        assert record["failed_exports"] == {"broken": "format 'broken': no words for it"}
    # A config that does not ask for it is content, and a format that works again is made.
    run("packed")
    monkeypatch.setitem(
        deploy.FORMATS, "broken", dataclasses.replace(deploy.FORMATS["packed"], file="broken")
    )
    assert all(set(record.exports) == {"packed", "broken"} for record in run("packed", "broken"))
    record = json.loads((copied / "student" / "0" / "result.json").read_text())
    assert "failed_exports" not in record
