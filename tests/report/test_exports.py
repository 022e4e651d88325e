"""The table of exported files, by hand."""

from kdq.report import exports, table


def _record(arm, seed, **entry):
    exported = {"onnx": entry} if entry else {}
    own = {"energy_modelled_nj": 2000.0} if arm == "qat_w4" else {}
    return {"arm": arm, "seed": seed, "status": "ok", "exports": exported, **own}


def test_means_over_seeds_by_hand():
    timed = lambda ms, ratio: {
        "conditions": {"device": "cpu"},
        "64": {"milliseconds": ms, "ratio": ratio, "quartiles": [1, 2]},
    }
    common = {"argmax_agreement": 1.0}
    records = [
        _record("qat_w4", 0, size_bytes=1000, accuracy=0.9, max_code_difference=0, **common,
                latency=timed(1.0, 2.0), smaller_than_float=4.0, recommended=True),
        _record("qat_w4", 1, size_bytes=2000, accuracy=0.8, max_code_difference=1, **common,
                latency=timed(2.0, 4.0), smaller_than_float=6.0, recommended=True),
        _record("kd", 0),
        _record("float", 0, size_bytes=500, accuracy=0.7, **common),
    ]  # fmt: skip
    lines = exports.markdown(records).splitlines()
    head = "| Arm | Format | Accuracy % | Agreement % | Δ codes | Size | Smaller | Batch 64, ms | "
    assert lines[0] == head + "Batch 64, times faster | Energy, modelled |"
    assert lines[2] == (
        "| qat_w4 | **onnx** | 85.00 ± 7.07 | 100.00 ± 0.00 | 1 | 1.5 KiB | 5.0× | 1.500 ± 0.707 | "
        "3.00 ± 1.41 | 2 µJ |"
    )
    assert lines[3] == ("| float | onnx | 70.00 (n=1) | 100.00 (n=1) | — | 500 B | — | — | — | — |")
    assert lines[4] == ""
    # A table of arms has it, too.
    assert "\n".join(lines) in table.markdown(table.rows(records), records)


def test_nothing_exported_is_no_table():
    assert exports.markdown([_record("kd", 0)]) == ""
