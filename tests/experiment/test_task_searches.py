"""Searches and exports of other tasks than classification."""

import numpy as np
import pytest
import test_task_runs

from kdq import config, experiment, files, tasks
from kdq.experiment.context import Context

FORMATS = ("packed", "stablehlo")


@pytest.fixture(scope="module", params=list(test_task_runs.CASES))
def searched(request, make_once, tmp_path_factory):
    """A task's name, its folder, and the record of an arm with searched bits, which is exported."""
    name = request.param
    workdir = test_task_runs.copy_finished(name, make_once, tmp_path_factory)
    fields = test_task_runs.make(name)
    low_bits = {"model": "student", "init": "kd", "bits": "bits", "ptq": ""}
    search = {
        "students": ("kd",),
        "teacher": "teacher",
        "method": "greedy",
        "choices": ("W2A8", "W8A8"),
        "sensitivity": "fisher",
        "evaluations": 12,
        "most": {"average_bits": 5.0},
        "objective": "error",
    }
    fields |= {
        "arms": fields["arms"] | {"low_bits": low_bits},
        "searches": {"bits": search},
        "export": {"formats": FORMATS, "arms": ("low_bits",), "examples": 64},
    }
    records = experiment.run(config.freeze(fields), workdir)
    return name, workdir, {record.arm: record for record in records}["low_bits"]


def test_bits_are_searched_by_the_error_of_the_task(searched):
    _, workdir, record = searched
    context = Context(config.freeze(files.read_json(workdir / "config.json")), workdir)
    scores, validation = record.search["scores"], record.metrics["validation"]
    primary = context.task.primary
    value = validation[primary.name]
    assert record.search["objective"] == "error"
    error = 1 - value if primary.higher_is_better else value
    assert scores["error"] == pytest.approx(error, rel=0.02)  # biases are rounded since
    assert scores["loss"] > 0
    assert set(record.search["chosen"].values()) & {"W2A8", "W8A8"}


def test_files_have_the_metric_of_the_task_and_say_what_outputs_mean(searched):
    name, workdir, record = searched
    primary = tasks.build(name).primary
    for entry in record.exports.values():
        assert entry[primary.name] == pytest.approx(record.metrics["test"][primary.name], rel=1e-3)
        assert entry["argmax_agreement"] > 0.99
    manifest = files.read_json(workdir / "low_bits" / "0" / "export" / "manifest.json")
    prediction = manifest["prediction"]
    assert prediction["task"] == name
    if name == "regression":
        frozen = config.freeze(files.read_json(workdir / "config.json"))
        labels = Context(frozen, workdir).inputs.labels
        np.testing.assert_allclose(prediction["mean"], [labels.mean()], rtol=1e-5)
        np.testing.assert_allclose(prediction["std"], [labels.std()], rtol=1e-5)
    else:
        assert prediction["meaning"] == "logits"
