"""Constraints, ranking and nearest misses, on records whose answer is obvious."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from kdq.fields import ConfigError
from kdq.report.advisor import constraints as limits
from kdq.report.advisor.constraints import Constraints, fit, nearest, rank
from kdq.report.advisor.study import studies
from kdq.report.workdirs import read_evidence

DATA = {"train": "a", "validation": "b", "test": "c"}


def record(arm, kind, bits="fp32", *, validation, test=0.5, seed=0, kib=4.0, **more):
    return {
        "arm": arm, "seed": seed, "kind": kind, "bits": bits, "status": "ok", "data": DATA,
        "params": 1000, "accuracy": test, "validation_accuracy": validation,
        "validation_nll": 0.1, "size_bytes": kib * 1024, "train_seconds": 60.0, "steps": 10,
        "reference": None, **more,
    }  # fmt: skip


def exported(**formats):
    """Of each format (KiB, ms of one example)."""
    return {
        name: {
            "size_bytes": kib * 1024,
            "latency": {"conditions": {"device": "cpu"}, "1": {"milliseconds": ms}},
        }
        for name, (kib, ms) in formats.items()
    }


def study(tmp_path, records):
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(records))
    (found,) = studies(read_evidence([], [str(path)]))
    return found


def fits(tmp_path, records, **given):
    found = study(tmp_path, records)
    return {c.arm: fit(c, Constraints(**given), found) for c in found.candidates}


def states(one):
    return {check.requirement: check.state for check in one.checks}


def test_selects_on_validation_where_test_disagrees(tmp_path):
    records = [
        record("good", "QAT", "W4A4", validation=0.95, test=0.80),
        record("lucky", "QAT", "W4A4", validation=0.85, test=0.99),
    ]
    found = fits(tmp_path, records, min_accuracy=90)
    assert (found["good"].satisfies, found["lucky"].satisfies) == (True, False)
    groups = rank(list(fits(tmp_path, records).values()))
    assert [[f.candidate.arm for f in group] for group in groups] == [["good"], ["lucky"]]


@pytest.mark.parametrize(
    ("margin", "state"), [(-0.01, "yes"), (0.01, "likely"), (4.0, "no")], ids=str
)
def test_certain_only_if_students_interval_is_above(tmp_path, margin, state):
    values = [0.95, 0.96, 0.98]
    percents = 100 * np.array(values)
    low, _ = stats.t.interval(0.95, 2, percents.mean(), stats.sem(percents))
    records = [record("a", "KD", validation=v, seed=s) for s, v in enumerate(values)]
    found = fits(tmp_path, records, min_accuracy=float(low + margin))["a"]
    assert states(found) == {"accuracy": state}
    assert (found.satisfies, found.certain) == (state != "no", state == "yes")


def test_drop_is_paired_by_seed(tmp_path):
    teacher, student = [0.90, 0.95, 0.99], [0.895, 0.944, 0.986]  # far apart, but in step
    low = stats.ttest_rel(student, teacher).confidence_interval(0.95).low * 100
    records = [
        record(name, kind, validation=v, seed=s)
        for name, kind, values in (("t", "teacher", teacher), ("s", "KD", student))
        for s, v in enumerate(values)
    ]
    assert states(fits(tmp_path, records, max_drop=-low + 0.001)["s"]) == {"drop": "yes"}
    assert states(fits(tmp_path, records, max_drop=-low - 0.001)["s"]) == {"drop": "likely"}
    assert states(fits(tmp_path, records, max_drop=0.4)["s"]) == {"drop": "no"}
    assert states(fits(tmp_path, records, max_drop=0.0)["t"]) == {"drop": "yes"}
    without = [r for r in records if r["arm"] == "s"]
    assert states(fits(tmp_path, without, max_drop=5.0)["s"]) == {"drop": "?"}


def test_a_mean_that_equals_the_limit_is_within(tmp_path):
    # 0.1 + 0.2 and its like: shares of 360 examples of which the mean is one point lower.
    lower = [(355 - extra) / 360 for extra in (3, 4, 3, 4, 4, 3, 4, 4, 4, 3)]
    records = [record("t", "teacher", validation=355 / 360, seed=s) for s in range(10)]
    records += [record("s", "KD", validation=v, seed=s) for s, v in enumerate(lower)]
    assert fits(tmp_path, records, max_drop=1.0)["s"].satisfies


def test_size_and_latency_hold_of_one_file(tmp_path):
    files = exported(onnx=(9.0, 0.1), litert=(3.0, 0.5))
    own = [record("a", "QAT", "W8A8", validation=0.9, kib=1.0, exports=files)]
    assert fits(tmp_path, own, max_latency_ms=0.2)["a"].file == "onnx"
    assert fits(tmp_path, own, max_size_kib=4)["a"].file == limits.PACKED
    # The packed file is small, one export is small, the other is fast: none is both.
    assert not fits(tmp_path, own, max_latency_ms=0.2, max_size_kib=4)["a"].satisfies
    both = fits(tmp_path, own, max_latency_ms=0.6, max_size_kib=4)["a"]
    assert (both.file, both.satisfies) == ("litert", True)
    assert states(fits(tmp_path, own, max_latency_ms=9.0, batch=64)["a"]) == {"latency": "?"}


def test_ties_go_to_the_simplest_method(tmp_path):
    noise = [0.002, -0.002, 0.001, -0.001]
    records = [
        record(arm, kind, bits, validation=v, seed=s, reference=reference)
        for arm, kind, bits, reference, values in (
            ("qad", "QAD", "W4A4", None, [0.95] * 4),
            ("ptq", "PTQ", "W4A4", "student", [0.9495 + n for n in noise]),
            ("student", "labels", "fp32", None, [0.90] * 4),
        )
        for s, v in enumerate(values)
    ]
    groups = rank(list(fits(tmp_path, records).values()))
    assert [[f.candidate.arm for f in g] for g in groups] == [["ptq", "qad"], ["student"]]


def test_a_wide_interval_does_not_tie_a_collapsed_arm_with_the_best(tmp_path):
    """Its interval contains 0, and that says nothing."""
    records = [record("qad", "QAD", "W2A2", validation=0.9, seed=s) for s in range(2)]
    records += [
        record("ptq", "PTQ", "W2A2", validation=v, seed=s) for s, v in enumerate((0.1, 0.8))
    ]
    groups = rank(list(fits(tmp_path, records).values()))
    assert [[f.candidate.arm for f in g] for g in groups] == [["qad"], ["ptq"]]


def test_device_labels_teacher_and_training(tmp_path):
    records = [
        record("teacher", "teacher", validation=0.9),
        record("student", "labels", validation=0.9),
        record("kd", "KD", validation=0.9, reference="student"),
        record("ptq", "PTQ", "W8A8", validation=0.9, reference="student", train_seconds=0.0,
               steps=0),
        record("ptq_kd", "PTQ", "W4A8", validation=0.9, reference="kd", train_seconds=0.0, steps=0),
        record("ptq_t", "PTQ", "W8A8", validation=0.9, reference="teacher", train_seconds=0.0,
               steps=0),
        record("odd", "QAT", "mxfp4", validation=0.9),
    ]  # fmt: skip
    in_state = lambda state, **given: {
        arm for arm, one in fits(tmp_path, records, **given).items() if one.named(state)
    }
    assert in_state("no", integers="none") == {"ptq", "ptq_kd", "ptq_t"}
    assert in_state("no", integers="8") == {"ptq_kd"}
    assert in_state("?", integers="8") == {"odd"}
    assert in_state("no", labels=False) == {"student", "ptq", "odd"}
    assert in_state("?", labels=False) == {"kd", "ptq_kd"}  # a recipe may have labels in it
    assert in_state("no", teacher=False) == {"teacher", "kd", "ptq_kd", "ptq_t"}
    # Without training there is the teacher, as it is or calibrated: students have to be trained.
    assert in_state("no", training_minutes=0) == {"student", "kd", "ptq", "ptq_kd", "odd"}
    assert in_state("no", training_minutes=1) == set()


def test_nearest_miss(tmp_path):
    records = [
        record("far", "QAT", "W8A8", validation=0.99, kib=9.0),
        record("near", "QAT", "W4A4", validation=0.95, kib=5.0),
        record("small", "QAT", "W2A2", validation=0.70, kib=3.0),
        record("neither", "QAT", "W3A3", validation=0.70, kib=4.5),
    ]
    found = nearest(list(fits(tmp_path, records, max_size_kib=4, min_accuracy=90).values()))
    assert {name: (n, one.candidate.arm) for name, (n, one) in found.items()} == {
        "size": (3, "near"),
        "accuracy": (2, "small"),
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_size_kib": -1.0}, "--max_size_kib=-1.0: expected a number above 0"),
        ({"max_latency_ms": math.inf}, "--max_latency_ms=inf"),
        ({"min_accuracy": -1.0}, "--min_accuracy=-1.0: expected 0 to"),
        ({"batch": 0}, "--batch=0: expected at least 1"),
        ({"integers": "4"}, "unknown --integers: '4'; valid: none, 8, sub8"),
    ],
)
def test_mistakes(given, says):
    with pytest.raises(ConfigError) as error:
        Constraints(**given)
    assert says in str(error.value)
