"""compress: one's own model on one's own arrays, from training to a small file."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl import logging

import kdq
from kdq import deploy, quantize, tasks
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
    assert [r.arm for r in records] == ["teacher", "student", "kd", "ptq", "qad"]
    inputs, labels = DATA["test"]
    for record in records:
        path = workdir / record.arm / "0" / "model.safetensors"
        packed = deploy.load_packed(path)
        assert isinstance(packed.network.module, Net)
        accuracy = np.mean(np.argmax(packed(inputs.astype(np.float32)), -1) == labels)
        assert accuracy == pytest.approx(record.value("accuracy"))
        assert path.stat().st_size == record.size_bytes
    by_arm = {r.arm: r for r in records}
    assert by_arm["qad"].value("accuracy") > 0.9
    assert by_arm["qad"].size_bytes < by_arm["teacher"].size_bytes / 4
    assert (workdir / "table.md").is_file()
    packed = deploy.load_packed(workdir / "qad" / "0" / "model.safetensors")
    summary = quantize.summary(
        packed.network.module, packed.variables, packed.weight_quantizers, inputs[:1]
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
    before = contents(workdir)
    for models, changed, message in (
        ((Net(48), Net(8)), {"epochs": 5}, r"arms.teacher.epochs was 4.0, is 5.0, arms.student"),
        ((Net(48), Net(8)), {"alpha": 0.5}, r"distill.kd.task was 0.\d+, is 0.5, distill"),
        ((Net(48), Net(9)), {"bits": "W8A8"}, r"models.student.width was 8, is 9\)"),
        ((Net(48),), {}, "has arms that this call does not make, kd, student: choose another work"),
        (
            (Net(48), Net(8)),
            {"teacher_variables": Net(48).init(jax.random.key(0), np.zeros((1, 12)))},
            r"arms.teacher.load was '', is '.*', arms.teacher.epochs was 4.0, is 0.0, ",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as raised:
            kdq.compress(*models, **{**DATA, **QUICK, **changed}, workdir=workdir)
        assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match=r"data.npz holds other arrays \(test_inputs\): choose"):
        kdq.compress(Net(48), Net(8), **{**DATA, "test": blobs(90)}, workdir=workdir, **QUICK)
    (workdir / "teacher.safetensors").unlink()  # of the call that was refused
    assert contents(workdir) == before


def contents(workdir):
    """What every file of arms holds, and when it was written."""
    files = [path for path in workdir.glob("*/*/*") if path.is_file()]
    assert files
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.slow
def test_a_workdir_takes_other_widths_and_seeds_and_keeps_what_is_done(tmp_path, capsys):
    call = functools.partial(kdq.compress, Net(8), **DATA, workdir=tmp_path / "run", **QUICK)
    first = call(bits="W4A8")
    assert [r.arm for r in first] == ["teacher", "ptq", "qad"]
    before = contents(tmp_path / "run")
    capsys.readouterr()
    both = call(bits=("W8A8", "W4A8"))
    widths = {"ptq": "W4A8", "qad": "W4A8", "ptq_w8a8": "W8A8", "qad_w8a8": "W8A8"}
    assert {r.arm: r.bits for r in both} == {"teacher": "fp32", **widths}
    assert both[:3] == first
    printed = capsys.readouterr().out
    assert all(any(name in line.split() for line in printed.splitlines()) for name in widths)
    # A seed more, of one width: nothing else is run.
    more = call(bits="W8A8", seeds=(1,))
    assert [r for r in more if r.seed == 0] == both
    assert [r.arm for r in more if r.seed == 1] == ["teacher", "ptq_w8a8", "qad_w8a8"]
    after = contents(tmp_path / "run")
    assert {path: after[path] for path in before} == before
    # The same bits as in a workdir where all was asked for at once.
    at_once = kdq.compress(
        Net(8), **DATA, workdir=tmp_path / "new", **QUICK, bits=("W8A8", "W4A8"), seeds=(0, 1)
    )
    assert [r.arm for r in at_once[::2]] == [
        *("teacher", "ptq_w8a8", "qad_w8a8", "ptq_w4a8", "qad_w4a8")
    ]
    named = {"ptq_w4a8": "ptq", "qad_w4a8": "qad"}
    same = [(r.arm, r.seed) for r in at_once if r.seed == 0 or "4" not in r.arm]
    for arm, seed in same:
        files = [
            deploy.load_packed(tmp_path / folder / name / str(seed) / "model.safetensors")
            for folder, name in (("new", arm), ("run", named.get(arm, arm)))
        ]
        jax.tree.map(np.testing.assert_array_equal, *(file.variables for file in files))
    assert len(same) == len(more)


def test_another_program_imports_the_class_or_gives_the_model(distilled, monkeypatch):
    _, workdir = distilled
    path = workdir / "qad" / "0" / "model.safetensors"
    here = deploy.load_packed(path)
    monkeypatch.delattr(f"{__name__}.Net")
    with pytest.raises(
        deploy.ModelNotImportedError, match=r"of the class test_own:Net, which is not there: pass"
    ):
        deploy.load_packed(path)
    given = deploy.load_packed(path, here.network)
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
    assert [r.arm for r in records] == ["teacher", "ptq", "qad"]
    own = np.mean(teacher.apply(variables, inputs).argmax(-1) == labels)
    assert records[0].value("accuracy") == pytest.approx(own)
    assert records[0].steps == 0
    assert records[2].steps == round(2 * 240 / 32)
    # Two layers: none is spared, and both have what was asked for.
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantize"]["keep"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("task", "outputs"), [("regression", 1), ("multilabel", 3)])
def test_other_tasks_are_compressed_alike(tmp_path, task, outputs):
    one_hot = lambda y: np.eye(3, dtype=np.float32)[y]
    labels = one_hot if task == "multilabel" else lambda y: 10.0 + y
    splits = {name: (x, labels(y)) for name, (x, y) in DATA.items()}
    models = (Net(16, classes=outputs), Net(8, classes=outputs))
    records = kdq.compress(*models, **splits, workdir=tmp_path, task=task, **QUICK)
    metric = tasks.build(task).primary
    for record in records:
        assert (record.status, record.task) == ("ok", task)
        assert record.metrics["test"].keys() >= {metric.name}
    (recipe,) = json.loads((tmp_path / "config.json").read_text())["distill"].values()
    assert [*recipe["terms"]] == [{"regression": "squared_error"}.get(task, "bernoulli_kl")]
    with pytest.raises(ConfigError, match="expected integer labels"):
        kdq.compress(*models, **splits, workdir=tmp_path / "other", **QUICK)


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
    splits = {
        "train": (pixels, y),
        "validation": (pixels[:60], y[:60]),
        "test": (pixels[60:], y[60:]),
    }
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
            r"models.teacher: task classification: the data has 3 classes, the model 4",
        ),
        ((Net(8), Empty()), {}, ConfigError, "Empty has no layer that can be quantized"),
        ((Net(8),), {"bits": "W9"}, ConfigError, r"config.arms.ptq.bits.*'W9'"),
        ((Net(8),), {"bits": ("W8", "W9")}, ConfigError, r"config.arms.ptq_w9.bits.*'W9'"),
        ((Net(8),), {"bits": ()}, ConfigError, r"bits=\(\): expected 'W4A8', or several"),
        ((Net(8),), {"epochs": 0}, ConfigError, "config.arms.teacher.epochs=0.0"),
        ((Net(8),), {"test": DATA["test"][0]}, DataError, "test: expected a pair"),
        ((nn.Conv(3, (3, 3)),), {}, ConfigError, "__call__ takes .*expected `train: bool`"),
        (
            (Net(8),),
            {"teacher_variables": Net(9).init(jax.random.key(0), np.zeros((1, 12)))},
            ConfigError,
            r"does not fit its model: batch_stats/.* is float32\[9\], the model's float32\[8\]",
        ),
    ],
)
def test_mistakes_are_said_before_anything_trains(tmp_path, models, changed, error, message):
    with pytest.raises(error, match=message):
        kdq.compress(*models, **{**DATA, "workdir": tmp_path, **QUICK, **changed})
    assert not list(Path(tmp_path).glob("*/0/result.json"))
