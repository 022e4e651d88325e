"""A small experiment from end to end, run again, extended, broken and refused."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.datasets import load_digits

from kdq import config, data, deploy, experiment, files
from kdq.data.sources.digits import split_ids
from kdq.report import table

ARMS = ["teacher", "student", "kd", "ptq", "qat", "qad"]


def by_arm(records):
    return {record.arm: record for record in records}


def every_file(workdir):
    return {
        path.relative_to(workdir): (path.stat().st_mtime_ns, path.read_bytes())
        for path in workdir.rglob("*")
        if path.is_file()
    }


class Watcher(experiment.Progress):
    """Notes which arms really run."""

    def __init__(self):
        self.total, self.ran, self.steps, self.finished = 0, [], {}, []

    def start(self, steps):
        self.total = len(steps)

    def arm(self, name, seeds, steps):
        self.ran += [(name, seed) for seed in seeds]
        self.steps[name] = steps

    def done(self, record):
        self.finished.append((record.arm, record.seed))


# The records.


def test_records_have_every_field(finished):
    _, workdir, records = finished
    assert [r.arm for r in records] == ARMS
    numbers = [
        *("macs", "bops", "params", "size_bytes"),
        *("train_seconds", "compile_seconds", "steps", "selected_step"),
    ]
    for record in records:
        assert record.status == "ok"
        assert record.seed == 0
        for key in numbers:
            assert isinstance(getattr(record, key), int | float), key
            assert math.isfinite(getattr(record, key)), key
        assert record.task == "classification"
        assert record.metrics.keys() == {"test", "test_last", "validation"}
        assert {"agreement", "kl_to_teacher"} <= record.fidelity.keys()
        for values in (*record.metrics.values(), record.fidelity):
            assert all(map(math.isfinite, values.values()))
        for values in record.metrics.values():
            assert values.keys() == {"accuracy", "nll"}
        for key in ("config_digest", "arm_digest", "commit", "device"):
            assert getattr(record, key), key
        assert record.versions["jax"]
        assert set(record.data) == {"train", "validation", "test"}
        on_disk = files.read_json(workdir / record.arm / "0" / "result.json")
        assert on_disk == record.to_json()
    records = by_arm(records)
    assert [records[a].bits for a in ARMS] == ["fp32", "fp32", "fp32", "W4A4", "W4A4", "W2"]
    kinds = ["teacher", "labels", "KD", "PTQ", "QAT", "QAD"]
    assert [records[a].kind for a in ARMS] == kinds
    assert records["kd"].reference == "student"
    assert records["teacher"].reference == ""
    assert len({r.config_digest for r in records.values()}) == 1
    assert len({r.arm_digest for r in records.values()}) == len(ARMS)
    assert records["ptq"].observer == "mse"
    assert records["kd"].observer == ""


def test_costs_and_sizes(finished):
    _, workdir, records = finished
    records = by_arm(records)
    # Student: conv_0 3·3·1·4 at 8×8, conv_1 3·3·4·6 at 4×4, head 6·10; with biases.
    conv_0, conv_1, head = 36 * 64, 216 * 16, 60
    assert records["student"].params == 36 + 4 + 216 + 6 + 60 + 10
    for arm in ARMS[1:]:
        assert records[arm].macs == conv_0 + conv_1 + head
    assert records["student"].bops == (conv_0 + conv_1 + head) * 1024
    assert records["qat"].bops == conv_0 * 8 * 8 + (conv_1 + head) * 4 * 4  # conv_0 is kept
    assert records["qad"].bops == conv_0 * 8 * 32 + (conv_1 + head) * 2 * 32
    # Teacher: 3·3·1·8 at 8×8, 3·3·8·8 at 4×4, head 8·10; scale and bias of two norms.
    assert records["teacher"].macs == 72 * 64 + 576 * 16 + 80
    assert records["teacher"].params == 72 + 576 + 4 * 8 + 80 + 10
    for arm in ARMS:
        file = workdir / arm / "0" / "model.safetensors"
        assert records[arm].size_bytes == os.stat(file).st_size
    assert records["qad"].size_bytes < records["qat"].size_bytes


def test_numbers_are_those_of_the_file_on_the_test_split(finished):
    """Computed here: pixels from scikit-learn, metrics in NumPy."""
    _, workdir, records = finished
    digits, ids = load_digits(), split_ids()["test"]
    images = ((digits.images[ids][..., None] - 4.9) / 6.0).astype(np.float32)
    labels = digits.target[ids]
    load = lambda arm: deploy.load_packed(workdir / arm / "0" / "model.safetensors")
    log_p = {arm: log_softmax(np.asarray(load(arm)(images), np.float64), -1) for arm in ARMS}
    teacher = log_p["teacher"]
    for record in records:
        mine = log_p[record.arm]
        nll = -mine[np.arange(len(labels)), labels].mean()
        kl = (np.exp(teacher) * (teacher - mine)).sum(-1).mean()
        assert record.value("accuracy") == pytest.approx(
            (mine.argmax(-1) == labels).mean(), abs=1e-12
        )
        assert record.value("nll") == pytest.approx(nll, rel=1e-5)
        assert record.value("kl_to_teacher") == pytest.approx(kl, rel=1e-4, abs=1e-6)
        agreement = (mine.argmax(-1) == teacher.argmax(-1)).mean()
        assert record.value("agreement") == pytest.approx(agreement, abs=1e-12)
    records = by_arm(records)
    assert records["teacher"].value("agreement") == 1
    assert records["student"].value("agreement") < 1
    assert records["teacher"].value("accuracy") > 0.2  # it learned something


def test_steps_and_selection(finished):
    _, workdir, records = finished
    records = by_arm(records)
    per_epoch = len(split_ids()["train"]) / 64
    for arm, epochs in (("teacher", 1), ("kd", 1), ("qat", 0.5), ("qad", 0.5)):
        record = records[arm]
        assert record.steps == round(epochs * per_epoch)
        assert record.selected_on == "validation"
        lines = (workdir / arm / "0" / "metrics.jsonl").read_text().splitlines()
        validations = [e for e in map(json.loads, lines) if "validation_nll" in e]
        assert len(validations) == 3
        best = max(validations, key=lambda e: (e["validation_accuracy"], -e["validation_nll"]))
        assert record.selected_step == best["step"]
        assert record.value("accuracy", "validation") == best["validation_accuracy"]
        assert record.value("nll", "validation") == best["validation_nll"]
        if best["step"] == record.steps:
            assert record.value("accuracy", "test_last") == record.value("accuracy")
    assert records["ptq"].steps == 0
    assert records["ptq"].train_seconds == 0
    assert records["ptq"].selected_on == "calibration only"


def test_ptq_is_the_selected_student_rounded(finished):
    _, workdir, _ = finished
    load = lambda arm: deploy.load_packed(workdir / arm / "0" / "model.safetensors")
    student, ptq = (load(arm).variables["params"] for arm in ("student", "ptq"))
    for layer, levels in (("conv_0", 256), ("conv_1", 16), ("head", 16)):
        kernel, rounded = (np.asarray(p[layer]["kernel"]) for p in (student, ptq))
        kernel, rounded = (k.reshape(-1, k.shape[-1]) for k in (kernel, rounded))
        assert not np.array_equal(kernel, rounded)
        assert max(len(np.unique(column)) for column in rounded.T) <= levels
        # Nearest: no farther off than half the finest gap, where the grid does not clip.
        reach = np.abs(rounded).max(0) * (levels / 2) / (levels / 2 - 1)
        gap = 2 * np.abs(rounded).max(0) / (levels / 2 - 1)
        inside = np.abs(kernel) <= reach
        assert (np.abs(kernel - rounded) <= gap)[inside].all()
        # Its chain corrects biases, by about the mean error of rounding.
        moved = np.abs(np.asarray(student[layer]["bias"]) - np.asarray(ptq[layer]["bias"]))
        assert 0 < moved.max() < 0.5


def test_the_file_says_what_it_is(finished):
    _, workdir, records = finished
    packed = deploy.load_packed(workdir / "qad" / "0" / "model.safetensors")
    record = by_arm(records)["qad"]
    for key in ("arm", "seed", "bits", "arm_digest"):
        assert packed.metadata[key] == getattr(record, key)
    assert packed.metadata["data"] == {"name": "digits", "mean": 4.9, "std": 6.0}


# Run again.


def test_a_finished_experiment_does_nothing(finished):
    frozen, workdir, records = finished
    before, watcher = every_file(workdir), Watcher()
    again = experiment.run(frozen, workdir, progress=watcher)
    assert again == records
    assert watcher.ran == []
    assert watcher.total == len(watcher.finished) == len(ARMS)
    assert every_file(workdir) == before


def test_records_of_a_quick_run_say_so_and_those_that_are_there_stay(copied, tiny_config, finished):
    changed, _, records = {**tiny_config(), "quick": True}, *finished[1:]
    (copied / "ptq" / "0" / "result.json").unlink()
    again = by_arm(experiment.run(config.freeze(changed), copied))
    assert again.pop("ptq").quick is True
    assert again == {arm: record for arm, record in by_arm(records).items() if arm != "ptq"}
    assert not any(record.quick for record in records)


def test_only_what_is_new_runs(copied, tiny_config, finished):
    before, changed = every_file(copied), tiny_config()
    before = {path: file for path, file in before.items() if path.name != "config.json"}
    changed["arms"]["ptq8"] = {"model": "student", "init": "kd", "bits": "W8A8"}
    watcher = Watcher()
    records = experiment.run(config.freeze(changed), copied, progress=watcher)
    assert watcher.ran == [("ptq8", 0)]
    assert [r.arm for r in records] == [*ARMS, "ptq8"]
    after = every_file(copied)
    assert {path: after[path] for path in before} == before
    assert records[:-1] == finished[2]

    changed["seeds"] = (0, 1)
    watcher = Watcher()
    records = experiment.run(config.freeze(changed), copied, arms=["ptq"], progress=watcher)
    assert watcher.ran == [("teacher", 1), ("student", 1), ("ptq", 1)]
    assert [(r.arm, r.seed) for r in records] == [
        (arm, seed) for arm in ("teacher", "student", "ptq") for seed in (0, 1)
    ]
    teacher = [r for r in records if r.arm == "teacher"]
    assert teacher[0].value("nll") != teacher[1].value("nll")
    after = every_file(copied)
    assert {path: after[path] for path in before} == before


def test_an_arm_whose_result_is_lost_is_finished_from_its_checkpoint(copied, finished):
    frozen, original, records = finished
    (copied / "qat" / "0" / "result.json").unlink()
    (copied / "qat" / "0" / "model.safetensors").unlink()
    again = by_arm(experiment.run(frozen, copied))["qat"]
    expected = by_arm(records)["qat"]
    times = dict.fromkeys(("train_seconds", "calibration_seconds", "compile_seconds"))
    assert dataclasses.replace(again, **times) == dataclasses.replace(expected, **times)
    file = "qat/0/model.safetensors"
    assert (copied / file).read_bytes() == (original / file).read_bytes()


class Interrupting(experiment.Progress):
    """Stops the run at a step of an arm."""

    def __init__(self, arm, step):
        self.at, self.current = (arm, step), None

    def arm(self, name, seeds, steps):
        self.current = name

    def step(self, step):
        if (self.current, step) == self.at:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_experiment_ends_as_the_unbroken_one(finished, tmp_path):
    """Interrupted twice: between two checkpoints of an arm, and in the last step of another."""
    frozen, workdir, records = finished
    for arm, step in (("kd", 9), ("qad", by_arm(records)["qad"].steps)):
        with pytest.raises(KeyboardInterrupt):
            experiment.run(frozen, tmp_path, progress=Interrupting(arm, step))
        assert not (tmp_path / arm / "0" / "result.json").exists()
    again = experiment.run(frozen, tmp_path)
    times = dict.fromkeys(("train_seconds", "calibration_seconds", "compile_seconds", "commit"))
    for one, other in zip(again, records, strict=True):
        assert dataclasses.replace(one, **times) == dataclasses.replace(other, **times)
    for arm in ARMS:
        file = f"{arm}/0/model.safetensors"
        assert (tmp_path / file).read_bytes() == (workdir / file).read_bytes()
    for arm in ("teacher", "kd", "qad"):
        file = f"{arm}/0/metrics.jsonl"
        assert (tmp_path / file).read_text() == (workdir / file).read_text()


def test_another_config_is_refused_and_nothing_touched(copied, tiny_config):
    changed, before = tiny_config(), every_file(copied)
    changed["distill"]["kd"]["task"] = 0.5
    with pytest.raises(config.ConfigError) as error:
        experiment.run(config.freeze(changed), copied)
    message = str(error.value)
    assert str(copied / "kd" / "0") in message
    assert "another config" in message
    assert every_file(copied) == before


def test_a_new_reference_needs_no_run(copied, tiny_config):
    changed = tiny_config()
    changed["arms"]["qad"]["reference"] = "qat"
    watcher = Watcher()
    records = experiment.run(config.freeze(changed), copied, progress=watcher)
    assert watcher.ran == []
    assert by_arm(records)["qad"].reference == "qat"


# The test split decides nothing, and one seed gives one result.


def test_test_labels_change_no_weight_and_a_seed_decides_them_all(finished, tmp_path, monkeypatch):
    frozen, workdir, records = finished
    open_split = data.open_split

    def with_spoiled_test(name, split, **kwargs):
        source = open_split(name, split, **kwargs)
        if split != "test":
            return source

        def read(ids):
            batch = source.reader(ids)
            return {**batch, "image": 255 - batch["image"], "label": (batch["label"] + 1) % 10}

        return dataclasses.replace(source, reader=read)

    monkeypatch.setattr(data, "open_split", with_spoiled_test)
    spoiled = by_arm(experiment.run(frozen, tmp_path))
    for record in records:
        other, file = spoiled[record.arm], f"{record.arm}/0/model.safetensors"
        assert (workdir / file).read_bytes() == (tmp_path / file).read_bytes()
        for key in ("selected_step", "size_bytes"):
            assert getattr(other, key) == getattr(record, key)
        assert other.metrics["validation"] == record.metrics["validation"]
        assert other.value("nll") != record.value("nll")
        curves = [w / record.arm / "0" / "metrics.jsonl" for w in (workdir, tmp_path)]
        if record.steps:
            assert curves[0].read_text() == curves[1].read_text()


# Failure.


def test_an_arm_that_diverges_fails_alone(copied, tiny_config, finished):
    changed = tiny_config()
    changed["arms"]["wild"] = {
        "model": "student",
        "epochs": 0.5,
        "learning_rate": 1e36,
    }
    changed["arms"]["wild_ptq"] = {"model": "student", "init": "wild", "bits": "W4A4"}
    changed["arms"]["tame"] = {"model": "student", "init": "kd", "bits": "W8"}
    frozen, watcher = config.freeze(changed), Watcher()
    all_records = experiment.run(frozen, copied, progress=watcher)
    records = by_arm(all_records)
    assert {arm: r.status for arm, r in records.items()} == {
        **dict.fromkeys([*ARMS, "tame"], "ok"),
        "wild": "failed",
        "wild_ptq": "failed",
    }
    error = records["wild"].error
    assert error.startswith("arm wild, seed 0: NaN or infinity at step ")
    assert "layer" in error
    assert "arm wild_ptq, seed 0: it needs arm 'wild', which failed" in records["wild_ptq"].error
    assert records["wild"].value("accuracy") is None
    assert not (copied / "wild" / "0" / "model.safetensors").exists()
    documents = [record.to_json() for record in all_records]
    rows = {row.arm: row for row in table.rows(documents)}
    assert list(rows) == [*ARMS, "wild", "wild_ptq", "tame"]
    assert rows["wild"].failures == [(0, error)]
    assert "failed" in table.markdown(
        list(rows.values()), [record.to_json() for record in all_records]
    )
    # A failure is a result too: it is not repeated.
    watcher = Watcher()
    assert experiment.run(frozen, copied, progress=watcher) == all_records
    assert watcher.ran == []


@pytest.mark.slow
def test_a_teacher_that_diverges_leaves_labels_and_no_fidelity(tiny_config, tmp_path):
    changed = tiny_config()
    changed["arms"]["teacher"]["learning_rate"] = 1e36
    changed["arms"] = {k: changed["arms"][k] for k in ("teacher", "student", "kd")}
    records = by_arm(experiment.run(config.freeze(changed), tmp_path))
    assert [records[a].status for a in records] == ["failed", "ok", "failed"]
    assert np.isnan(records["student"].value("agreement"))
    assert np.isnan(records["student"].value("kl_to_teacher"))
    assert "needs arm 'teacher'" in records["kd"].error


# A live teacher, augmentation.


@pytest.mark.slow
def test_a_live_teacher_on_augmented_images(tiny_config, tmp_path):
    changed = tiny_config()
    changed["cache"] = {"kind": "none"}
    changed["data"]["augment"] = ({"name": "shift", "pixels": 1},)
    changed["arms"] = {k: changed["arms"][k] for k in ("teacher", "kd")}
    changed["arms"]["kd"]["reference"] = ""
    records = by_arm(experiment.run(config.freeze(changed), tmp_path))
    assert [r.status for r in records.values()] == ["ok", "ok"]
    line = json.loads((tmp_path / "kd" / "0" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(0.3 * line["task_loss"] + 0.7 * line["kl_loss"])
