"""The script that compares two commits sees what changes, and nothing else."""

import json
import runpy
from pathlib import Path

import pytest
from compare import compare

from kdq import config
from kdq.schema import TEACHERS

HERE = Path(__file__).parent
get_config = runpy.run_path(str(HERE / "every_arm.py"))["get_config"]


CACHES = ("none", "memory", "dense", "top_k", "sampled")


@pytest.mark.parametrize("cache", CACHES)
def test_the_experiment_is_valid(cache):
    assert config.freeze(get_config(f"cache={cache}")).cache.kind == cache


def test_every_kind_of_arm_and_of_teacher_is_there():
    experiment = config.freeze(get_config())
    assert {arm.kind for arm in experiment.arms.values()} == {"labels", "KD", "PTQ", "QAT", "QAD"}
    assert {teacher.kind for teacher in experiment.teachers.values()} == {*TEACHERS} - {"packed"}


def write(folder, accuracy, seconds, weights):
    place = folder / "kd" / "0"
    place.mkdir(parents=True)
    record = {"arm": "kd", "seed": 0, "status": "ok", "accuracy": accuracy}
    record |= {"exports": {"onnx": {"seconds": seconds, "size_bytes": 3}}}
    (place / "result.json").write_text(json.dumps({**record, "train_seconds": seconds}))
    (place / "model.safetensors").write_bytes(weights)
    return folder


def test_what_differs_is_named_and_times_are_not(tmp_path):
    before = write(tmp_path / "before", 0.5, 1.0, b"a")
    assert list(compare(before, write(tmp_path / "same", 0.5, 2.0, b"a"))) == []
    lines = list(compare(before, write(tmp_path / "other", 0.25, 1.0, b"b")))
    assert lines[1] == "kd/0/result.json: metrics.test.accuracy 0.5 -> 0.25"
    assert lines[0].startswith("kd/0/model.safetensors: ")
    assert len(lines) == 2
