"""The record of an arm: one table of its fields, for writing, refusing and leaving out."""

import dataclasses
import math

import pytest

from kdq import files
from kdq.fields import ConfigError
from kdq.record import ArmRecord

RECORD = ArmRecord(
    arm="kd",
    seed=0,
    kind="KD",
    bits="fp32",
    reference="student",
    data={"train": "ab"},
    metrics={"test": {"accuracy": 0.5, "nll": math.nan}},
    fidelity={"agreement": math.nan},
    accuracy_by_class=(1.0, math.nan),
    size_bytes=0,
    exports={"onnx": {"size_bytes": 7}},
    extra={"run": "base"},
)


def test_fields_that_were_not_measured_are_left_out_and_no_value_is_null():
    document = RECORD.to_json()
    assert document == {
        **{"arm": "kd", "seed": 0, "kind": "KD", "bits": "fp32", "observer": None},
        **{"reference": "student", "data": {"train": "ab"}, "status": "ok"},
        **{"task": "classification", "metrics": {"test": {"accuracy": 0.5, "nll": None}}},
        **{"fidelity": {"agreement": None}, "accuracy_by_class": [1.0, None], "size_bytes": 0},
        **{"exports": {"onnx": {"size_bytes": 7}}, "run": "base"},
    }


def test_a_record_is_read_as_it_was_written(tmp_path):
    files.write_json(tmp_path / "result.json", RECORD.to_json())
    record = ArmRecord.from_json(files.read_json(tmp_path / "result.json"))
    assert record == RECORD
    assert math.isnan(record.value("agreement"))
    assert math.isnan(record.value("nll"))
    assert record.value("nll", "validation") is None
    assert record.value("accuracy") == 0.5
    assert record.value("run") == "base"
    assert record.value("nothing") is None
    assert record != dataclasses.replace(RECORD, fidelity={})


def test_a_record_of_version_1_is_read_as_one_of_now():
    document = {"arm": "kd", "seed": 0, "status": "ok", "size_bytes": 7, "run": "base"}
    flat = {"accuracy": 0.9, "nll": 0.3, "accuracy_last": 0.8, "nll_last": None}
    flat |= {"validation_accuracy": 0.7, "validation_nll": 0.4, "agreement": None}
    record = ArmRecord.from_json(document | flat | {"kl_to_teacher": 0.1, "brier": 0.2})
    now = {
        "task": "classification",
        "metrics": {
            "test": {"accuracy": 0.9, "nll": 0.3},
            "test_last": {"accuracy": 0.8, "nll": None},
            "validation": {"accuracy": 0.7, "nll": 0.4},
        },
        "fidelity": {"agreement": None, "kl_to_teacher": 0.1},
    }
    expected = {**document, **now, "brier": 0.2, "observer": None, "reference": None}
    assert record.to_json() == expected
    assert ArmRecord.from_json(expected) == record


def test_metrics_of_other_tasks_have_their_own_limits():
    document = {"arm": "kd", "seed": 0, "status": "ok", "metrics": {"test": {"micro_f1": 1.5}}}
    with pytest.raises(ConfigError, match=r"^metrics.test.micro_f1=1.5: expected 0 to 1$"):
        ArmRecord.from_json({**document, "task": "multilabel"})
    for task in ("classification", "of_tomorrow"):
        assert ArmRecord.from_json({**document, "task": task}).value("micro_f1") == 1.5


def test_fields_of_a_newer_version_are_kept():
    document = {**RECORD.to_json(), "of_tomorrow": {"x": [1]}}
    record = ArmRecord.from_json(document)
    assert record.extra == {"run": "base", "of_tomorrow": {"x": [1]}}
    assert record.to_json() == document


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("metrics", {"test": {"accuracy": 1.5}}, "metrics.test.accuracy=1.5: expected 0 to 1"),
        ("metrics", {"test": 0.5}, "metrics={'test': 0.5}: expected an object of objects"),
        ("steps", -1, "steps=-1: expected at least 0"),
        ("bits", 4, "bits=4: expected text"),
        ("ece", math.inf, "ece=inf: expected a finite number, at most 3.4e+38"),
        ("fidelity", {"agreement": True}, "fidelity.agreement=True: expected float"),
        ("data", {"train": 1}, "data={'train': 1}: expected an object of texts"),
        ("policy", ["W4"], "policy=['W4']: expected an object"),
        ("accuracy_by_class", [0.5, "x"], "accuracy_by_class[1]='x': expected float"),
        (
            "exports",
            {"onnx": {"latency": {"1": 3}}},
            "exports={'onnx': {'latency': {'1': 3}}}",
        ),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused_or_left_out(field, value, message):
    document = {**RECORD.to_json(), field: value}
    with pytest.raises(ConfigError) as error:
        ArmRecord.from_json(document)
    assert str(error.value).startswith(message)
    reasons = []
    record = ArmRecord.from_json(document, left_out=reasons)
    assert [reason.startswith(message) for reason in reasons] == [True]
    default = ArmRecord(arm="kd", seed=0)
    left = getattr(record, field)
    assert (left if field != "metrics" else {**left.get("test", {})}) == getattr(default, field)


@pytest.mark.parametrize("document", [None, [], {}, {"arm": "a", "seed": 0}, {"arm": "a"}])
def test_what_is_no_record_is_refused_in_any_case(document):
    for left_out in (None, []):
        with pytest.raises(ConfigError, match=r"expected an object|is missing"):
            ArmRecord.from_json(document, left_out)


def test_a_field_that_is_needed_must_have_a_value():
    RECORD.require("accuracy", "size_bytes", "kind")
    for name in ("agreement", "nll", "ece", "device"):
        with pytest.raises(ConfigError, match=f"{name} is missing"):
            RECORD.require(name)
