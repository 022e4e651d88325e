"""compress: one's own model on one's own arrays, from training to a small file."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl import logging

import kdq
from kdq import deploy, quantize
from kdq.config import ConfigError
from kdq.data import DataError

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(3, 12))


class Net(nn.Module):
    width: int
    classes: int = 3

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.relu(nn.Dense(self.width, name="first")(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.relu(nn.Dense(self.width, name="middle")(x))
        return nn.Dense(self.classes, name="last")(x)


class Shallow(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool = False):
        return nn.Dense(3, name="only")(nn.relu(nn.Dense(4, name="hidden")(x)))


class Empty(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool = False):
        return x[:, :3]


def blobs(n):
    labels = np.arange(n) % 3
    return CENTRES[labels] + 0.5 * RNG.normal(size=(n, 12)), labels


DATA = {"train": blobs(240), "validation": blobs(60), "test": blobs(90)}
QUICK = {"epochs": 4, "learning_rate": 1e-2, "batch_size": 32}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("own") / "run"
    return kdq.compress(Net(48), Net(8), **DATA, workdir=workdir, **QUICK), workdir


def test_every_arm_is_measured_on_its_file(distilled):
    records, workdir = distilled
    assert [r["arm"] for r in records] == ["teacher", "student", "kd", "ptq", "qad"]
    inputs, labels = DATA["test"]
    for record in records:
        path = workdir / record["arm"] / "0" / "model.safetensors"
        packed = deploy.load_packed(path)
        assert isinstance(packed.model, Net)
        accuracy = np.mean(np.argmax(packed(inputs.astype(np.float32)), -1) == labels)
        assert accuracy == pytest.approx(record["accuracy"])
        assert path.stat().st_size == record["size_bytes"]
    by_arm = {r["arm"]: r for r in records}
    assert by_arm["qad"]["accuracy"] > 0.9
    assert by_arm["qad"]["size_bytes"] < by_arm["teacher"]["size_bytes"] / 4
    assert (workdir / "table.md").is_file()
    packed = deploy.load_packed(workdir / "qad" / "0" / "model.safetensors")
    summary = quantize.summary(
        packed.model, packed.variables, packed.weight_quantizers, inputs[:1], train=False
    )
    assert "middle" in str(summary)
    bits = {path: q["weights"].qmax.max() for path, q in packed.weight_quantizers.items()}
    assert {path: float(top) for path, top in bits.items()} == {
        "first": 127.0,
        "middle": 7.0,
        "last": 127.0,
    }


def test_the_page_says_that_such_inputs_have_no_maps(distilled):
    page = (distilled[1] / "report.html").read_text()
    assert "Only images have maps." in page
    assert "qad" in page


def test_the_same_call_again_trains_nothing_and_another_one_is_refused(distilled):
    records, workdir = distilled
    again = kdq.compress(Net(48), Net(8), **DATA, workdir=workdir, **QUICK)
    assert again == records
    with pytest.raises(ConfigError, match="was made with another config"):
        kdq.compress(Net(48), Net(8), **DATA, workdir=workdir, **{**QUICK, "epochs": 5})
    with pytest.raises(DataError, match=r"data.npz holds other arrays"):
        kdq.compress(Net(48), Net(8), **{**DATA, "test": blobs(90)}, workdir=workdir, **QUICK)


def test_another_program_imports_the_class_or_gives_the_model(distilled, monkeypatch):
    _, workdir = distilled
    path = workdir / "qad" / "0" / "model.safetensors"
    here = deploy.load_packed(path)
    monkeypatch.delattr(f"{__name__}.Net")
    with pytest.raises(deploy.PackedFileError, match=r"its model is 'test_own:Net', which is not"):
        deploy.load_packed(path)
    given = deploy.load_packed(path, here.model)
    inputs = DATA["test"][0].astype(np.float32)
    np.testing.assert_array_equal(given(inputs), here(inputs))


@pytest.mark.slow
def test_a_teacher_of_ones_own_is_kept_as_it_is_and_quantized(tmp_path):
    teacher = Shallow()
    inputs, labels = DATA["test"]
    variables = teacher.init(jax.random.key(0), inputs[:1])
    records = kdq.compress(
        teacher, teacher_variables=variables, **DATA, workdir=tmp_path, bits="W8A8", **QUICK
    )
    assert [r["arm"] for r in records] == ["teacher", "ptq", "qad"]
    own = np.mean(teacher.apply(variables, inputs).argmax(-1) == labels)
    assert records[0]["accuracy"] == pytest.approx(own)
    assert records[0]["steps"] == 0
    assert records[2]["steps"] == round(2 * 240 / 32)
    # Two layers: none is spared, and both have what was asked for.
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantize"]["keep"] == []


@pytest.mark.slow
def test_noise_is_warned_of_with_what_to_try(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    variables = Shallow().init(jax.random.key(0), DATA["test"][0][:1])
    options = {**QUICK, "epochs": 2, "bits": "W1A1"}
    kdq.compress(Shallow(), teacher_variables=variables, **DATA, workdir=tmp_path, **options)
    (line,) = [line for line in lines if "signal to quantization noise" in line]
    assert line.startswith("W1A1 by calibration: ")  # not of the arm that trains
    assert "'hidden'" in line
    assert "training through the quantizers" in line


@pytest.mark.slow
def test_pixels_are_seen_over_255(tmp_path):
    x, y = DATA["train"]
    pixels = np.clip(128 + 30 * x, 0, 255).astype(np.uint8)
    splits = {"train": (pixels, y), "validation": (pixels[:60], y[:60]), "test": (pixels, y)}
    variables = Shallow().init(jax.random.key(1), x[:1])
    kdq.compress(
        Shallow(), teacher_variables=variables, **splits, workdir=tmp_path, bits="W8", epochs=1
    )
    packed = deploy.load_packed(tmp_path / "teacher" / "0" / "model.safetensors")
    metadata = packed.metadata["data"]
    assert (metadata["mean"], metadata["std"]) == (0.0, 255.0)


@pytest.mark.parametrize(
    ("models", "changed", "error", "message"),
    [
        (
            (Net(8, classes=4),),
            {},
            ConfigError,
            r"models.teacher has outputs \(1, 4\).*want \(1, 3",
        ),
        ((Net(8), Empty()), {}, ConfigError, "Empty has no layer that can be quantized"),
        ((Net(8),), {"bits": "W9"}, ConfigError, r"config.arms.ptq.bits.*'W9'"),
        ((Net(8),), {"epochs": 0}, ConfigError, "config.arms.teacher.epochs=0.0"),
        ((Net(8),), {"test": DATA["test"][0]}, DataError, "test: want a pair"),
        ((nn.Conv(3, (3, 3)),), {}, ConfigError, "__call__ takes .*want `train: bool`"),
        (
            (Net(8),),
            {"teacher_variables": Net(9).init(jax.random.key(0), np.zeros((1, 12)))},
            ConfigError,
            r"does not fit its model: batch_stats/.* has shape \(9,\), want \(8,\)",
        ),
    ],
)
def test_mistakes_are_said_before_anything_trains(tmp_path, models, changed, error, message):
    with pytest.raises(error, match=message):
        kdq.compress(*models, **{**DATA, "workdir": tmp_path, **QUICK, **changed})
    assert not list(Path(tmp_path).glob("*/0/result.json"))
