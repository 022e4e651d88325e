"""The table of exported files, by hand."""

from kdq.report import exports


def _record(arm, seed, **entry):
    return {"arm": arm, "seed": seed, "status": "ok", "exports": {"onnx": entry} if entry else {}}


def test_means_over_seeds_by_hand():
    timed = lambda ms, ratio: {
        "conditions": {},
        "64": {"milliseconds": ms, "ratio": ratio, "quartiles": [1, 2]},
    }
    common = {"argmax_agreement": 1.0}
    records = [
        _record("qat_w4", 0, size_bytes=1000, accuracy=0.9, max_code_difference=0, **common,
                latency=timed(1.0, 2.0)),
        _record("qat_w4", 1, size_bytes=2000, accuracy=0.8, max_code_difference=1, **common,
                latency=timed(2.0, 4.0)),
        _record("kd", 0),
        _record("float", 0, size_bytes=500, accuracy=0.7, **common),
    ]  # fmt: skip
    lines = exports.markdown(records).splitlines()
    head = "| Arm | Format | Size | Accuracy % | Agreement % | Δ codes | Batch 64, ms | "
    assert lines[0] == head + "Batch 64, times faster |"
    assert lines[2] == (
        "| qat_w4 | onnx | 1.5 KiB | 85.00 ± 7.07 | 100.00 ± 0.00 | 1 | 1.500 ± 0.707 | "
        "3.00 ± 1.41 |"
    )
    assert lines[3] == "| float | onnx | 500 B | 70.00 (n=1) | 100.00 (n=1) | — | — | — |"
    assert lines[4] == ""


def test_nothing_exported_is_no_table():
    assert exports.markdown([_record("kd", 0)]) == ""
