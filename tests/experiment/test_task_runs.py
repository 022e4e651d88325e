"""Experiments of other tasks than classification, end to end with every kind of arm."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from kdq import config, data, experiment, tasks
from kdq.arms import recipe
from kdq.evaluate.run import Scores
from kdq.experiment.context import Context

BASE = {"epochs": 1.5, "learning_rate": 5e-3}
STUDENT = {**BASE, "model": "student"}
MODELS = {
    "diabetes": {"name": "mlp", "num_classes": 1},
    "digit_pairs": {"name": "mlp", "num_classes": 10},
}
PIXELS = {"diabetes": {"std": 1.0}, "digit_pairs": {"mean": 4.9, "std": 6.0}}
CASES = {
    "regression": ("diabetes", recipe("squared_error", 0.7)),
    "multilabel": ("digit_pairs", recipe("bernoulli_kl", 0.7, temperature=2.0)),
}
HINT = {"loss": "hint", "student": "dense_0", "teacher": "dense_0", "adapter": "linear"}


def make(task, /, **changed):
    """A config with every kind of arm, as plain dicts."""
    name, kd = CASES[task]
    taught = {"teacher": "teacher", "distill": "kd"}
    quantized = {"model": "student", "bits": "W4A4"}
    arms = {
        "teacher": {**BASE, "model": "teacher"},
        "student": STUDENT,
        "kd": {**STUDENT, **taught, "reference": "student"},
        "features": {**STUDENT, "teacher": "teacher", "distill": "features"},
        "ptq": {**quantized, "init": "kd", "ptq": "chain", "reference": "kd"},
        "qat": {**STUDENT, **quantized, "init": "student", "epochs": 0.5, "reference": "ptq"},
        "qad": {**STUDENT, **quantized, **taught, "init": "kd", "epochs": 0.5, "reference": "qat"},
    }
    if task == "regression":
        arms["bounded"] = {**STUDENT, "teacher": "teacher", "distill": "bounded"}
    made = {
        "seeds": (0,),
        "task": {"name": task},
        "data": {"name": name, "batch_size": 32, "eval_batch_size": 128, **PIXELS[name]},
        "models": {
            "teacher": {**MODELS[name], "widths": (32, 32)},
            "student": {**MODELS[name], "widths": (16, 16)},
        },
        "quantize": {"keep": ("dense_0",), "calibration_examples": 128},
        "distill": {
            "kd": kd,
            "features": {"task": 0.5, "terms": {"hint": HINT, **kd["terms"]}},
            "bounded": recipe("teacher_bounded", 0.5, margin=0.1),
        },
        "ptq": {"chain": ({"method": "equalize"}, {"method": "bias_correction"})},
        "evaluations": 2,
        "transfer": {"examples": 16},
        "arms": arms,
    }
    if task != "regression":
        del made["distill"]["bounded"]
    return {**made, **changed}


@pytest.fixture(scope="module", params=list(CASES))
def run(request, make_once, tmp_path_factory):
    """The name of a task, the folder of its experiment, and the records by arm."""
    workdir = copy_finished(request.param, make_once, tmp_path_factory)
    records = experiment.run(config.freeze(make(request.param)), workdir)  # nothing is left to do
    return request.param, workdir, {r.arm: r for r in records}


def copy_finished(task, make_once, tmp_path_factory):
    """Returns a copy of a folder in which the experiment of a task is finished."""
    frozen = config.freeze(make(task))
    shared = make_once(f"task-{task}", lambda path: experiment.run(frozen, path))
    return shutil.copytree(shared, tmp_path_factory.mktemp(task) / "run")


def test_every_kind_of_arm_is_measured_by_the_metrics_of_its_task(run):
    name, workdir, records = run
    task = tasks.build(name)
    assert {r.kind for r in records.values()} == {"teacher", "labels", "KD", "PTQ", "QAT", "QAD"}
    for record in records.values():
        assert (record.status, record.task) == ("ok", name)
        assert record.metrics.keys() == {"test", "test_last", "validation"}
        for values in record.metrics.values():
            assert list(values) == [metric.name for metric in task.metrics]
            assert np.isfinite(list(values.values())).all()
        assert list(record.fidelity) == [metric.name for metric in task.fidelity]
        assert bool(record.cka) == (record.arm != "teacher")
        assert record.accuracy_by_class == ()
        assert json.loads((workdir / record.arm / "0" / "result.json").read_text())["task"] == name


def test_scores_beside_a_record_are_those_that_it_is_computed_from(run):
    name, workdir, records = run
    context = Context(config.freeze(make(name)), workdir)
    for record in records.values():
        scores = Scores.load(workdir / record.arm / "0" / "scores.npz")
        assert len(scores) == len(context.inputs.splits["test"])
        assert scores.values(*context.task.metrics) == dict(record.metrics["test"])
        assert scores.values(*context.task.fidelity) == pytest.approx(record.fidelity, nan_ok=True)


def test_the_selected_weights_are_the_best_on_validation(run):
    name, workdir, records = run
    metric = tasks.build(name).primary
    for record in records.values():
        if not record.steps:
            continue
        path = workdir / record.arm / "0" / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        key = f"validation_{metric.name}"
        validations = [row for row in rows if key in row]
        best = (max if metric.higher_is_better else min)(validations, key=lambda row: row[key])
        assert (best["step"], best[key]) == (
            record.selected_step,
            record.value(metric.name, "validation"),
        )
        assert any(metric.name in row for row in rows)


def test_regression_is_in_the_units_of_its_targets(tmp_path):
    frozen = config.freeze(make("regression"))
    context = Context(frozen, tmp_path)
    labels = context.inputs.read_labels("train", "label")
    assert context.task.mean == pytest.approx([labels.mean()], rel=1e-5)
    assert context.task.std == pytest.approx([labels.std()], rel=1e-5)


def test_test_data_select_nothing(run, tmp_path, monkeypatch):
    name, workdir, records = run
    open_split = data.open_split

    def with_spoiled_test(dataset, split, **options):
        source = open_split(dataset, split, **options)
        if split != "test":
            return source
        return source_with(source, lambda labels: labels[::-1])

    monkeypatch.setattr(data, "open_split", with_spoiled_test)
    spoiled = experiment.run(config.freeze(make(name)), tmp_path)
    for other in spoiled:
        record, file = records[other.arm], f"{other.arm}/0/model.safetensors"
        assert (workdir / file).read_bytes() == (tmp_path / file).read_bytes()
        assert other.selected_step == record.selected_step
        assert other.metrics["validation"] == record.metrics["validation"]
        assert other.metrics["test"] != record.metrics["test"]


def source_with(source, change):
    """The source with its labels changed."""

    def read(ids):
        batch = source.reader(ids)
        return {**batch, "label": change(batch["label"])}

    return dataclasses.replace(source, reader=read)


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("regression", {"task": {"name": "regresion"}}, "regresion.*did you mean 'regression'"),
        ("regression", {"task": {"error": "huber"}}, r"config\.task\.name is missing"),
        ("regression", {"task": {"name": "regression", "delta": -1.0}}, r"config\.task\.delta=-1"),
        ("regression", {"task": {"name": "classification"}}, "expected integer labels in 'label'"),
        ("regression", {"task": {"name": "multilabel"}}, "expected labels 0 and 1"),
        (
            "regression",
            {"task": {"name": "regression", "keys": ("tokens",)}},
            r"unknown array of diabetes in config\.task: 'tokens'",
        ),
        (
            "regression",
            {"models": {k: {"name": "mlp", "num_classes": 3} for k in ("teacher", "student")}},
            r"config\.models\.teacher: task regression: expected outputs \(1, 1\)",
        ),
        (
            "multilabel",
            {"models": {k: {"name": "mlp", "num_classes": 9} for k in ("teacher", "student")}},
            r"config\.models\.teacher: task multilabel: expected outputs \(1, 10\)",
        ),
        (
            "regression",
            {"distill": {**make("regression")["distill"], "kd": recipe("kl", 0.5)}},
            "unknown config.distill.kd.terms.kl.loss of task 'regression': 'kl'.*squared_error",
        ),
        ("regression", {"cache": {"kind": "top_k", "size": 2}}, "has no classes to choose from"),
        (
            "multilabel",
            {"ptq": {"chain": ({"method": "teacher_guided"},)}},
            r"ptq\.chain\[0\]: 'teacher_guided' compares logits of classes by their KL",
        ),
        (
            "regression",
            {"ptq": {"chain": ({"method": "brecq", "fisher": True},)}},
            r"ptq\.chain\[0\]: 'brecq' compares logits of classes by their KL",
        ),
        (
            "regression",
            {"teachers": {"both": {"kind": "ensemble", "arms": ("teacher", "student")}}},
            r"teachers\.both\.average='probability'.*expected 'logit'",
        ),
        (
            "regression",
            {"arms": {**make("regression")["arms"], "s": {**STUDENT, "label_smoothing": 0.1}}},
            r"arms\.s\.label_smoothing=0\.1: the loss of task 'regression' has none",
        ),
        (
            "multilabel",
            {"arms": {**make("multilabel")["arms"], "s": {**STUDENT, "without_classes": (1,)}}},
            r"arms\.s\.without_classes=\(1,\): task 'multilabel' has no classes",
        ),
    ],
    ids=str,
)
def test_mistakes_are_said_in_a_line_before_anything_trains(task, changed, message, tmp_path):
    with pytest.raises(config.ConfigError, match=message) as raised:
        experiment.run(config.freeze(make(task, **changed)), tmp_path)
    assert len(str(raised.value).splitlines()) == 1
    assert not list(tmp_path.glob("*/0"))


def test_the_default_task_is_no_part_of_digests_and_others_are(tmp_path):
    made = make("regression")
    digests = {}
    for key, task in {
        "none": None,
        "default": {"name": "classification"},
        "regression": {"name": "regression"},
        "huber": {"name": "regression", "error": "huber"},
    }.items():
        changed = {**made, "task": task} if task else {k: v for k, v in made.items() if k != "task"}
        context = Context(config.freeze(changed), tmp_path)
        digests[key] = context.store.digests["student"]
    assert digests["none"] == digests["default"]
    assert len(set(digests.values())) == 3


def _run_some(workdir, keys=("image",)):
    """The metrics of an experiment with each kind of call of a model, by arm."""
    arms = ("teacher", "student", "kd", "features", "ptq")
    made = make("regression", task={"name": "regression", "keys": keys})
    made["arms"] = {name: made["arms"][name] for name in arms}
    records = experiment.run(config.freeze(made), workdir)
    return {r.arm: r.metrics for r in records}


def test_what_models_take_may_have_any_key(monkeypatch, tmp_path):
    expected = _run_some(tmp_path / "image")
    open_split = data.open_split
    rename = lambda arrays: {"row" if k == "image" else k: v for k, v in arrays.items()}

    def open_renamed(*args, **fields):
        source = open_split(*args, **fields)
        read = lambda ids: rename(source.reader(ids))
        return dataclasses.replace(source, spec=rename(source.spec), reader=read)

    monkeypatch.setattr(data, "open_split", open_renamed)
    assert _run_some(tmp_path / "row", keys=("row",)) == expected


def test_one_key_is_what_models_of_an_experiment_take(tmp_path):
    task = {"name": "regression", "keys": ("image", "id")}
    with pytest.raises(config.ConfigError, match=r"config\.task\.keys=.*expected one"):
        experiment.run(config.freeze(make("regression", task=task)), tmp_path)
