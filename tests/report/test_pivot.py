"""Methods by width, from rows by hand."""

import pytest
from test_table import record

from kdq.report.table import markdown_by_width, rows


def arms(*accuracies):
    """rtn and gptq at two widths, and an arm that has no bits in its name; two seeds."""
    names = ("w4a4_rtn", "w2a2_rtn", "w4a4_gptq", "gptq_w2a2", "student")
    bits = ("W4A4", "W2A2", "W4A4", "W2A2", "fp32")
    references = (None, None, "w4a4_rtn", "w2a2_rtn", None)
    return [
        record(name, seed, accuracy + seed * (1 + 0.1 * i), bits=b, reference=reference)
        for i, (name, b, reference, accuracy) in enumerate(
            zip(names, bits, references, accuracies, strict=True)
        )
        for seed in (0, 1)
    ]


def test_methods_are_rows_and_widths_are_columns():
    lines = markdown_by_width(rows(arms(90.0, 50.0, 91.0, 48.0, 95.0))).splitlines()
    assert lines[2:6] == [
        "| Method | W4A4 | W2A2 |",
        "|:--|--:|--:|",
        "| rtn | 90.50 ± 0.71 | **50.55 ± 0.78** |",
        "| gptq | **91.60 ± 0.85** | 48.65 ± 0.92 |",
    ]
    # Differences 1.0 and 1.2: mean 1.1, std 0.1414, t(0.975; 1) = 12.7062, so 1.1 ± 1.2706.
    assert lines[-1].startswith("| gptq | rtn | +1.10 [-0.17, +2.37] | -1.90 [-3.17, -0.63]\\*")
    assert lines[-2] == "| rtn | — | — | — |"


@pytest.mark.parametrize("keep", [("student",), ("w4a4_rtn", "student")])
def test_one_width_is_no_pivot(keep):
    records = [r for r in arms(90.0, 50.0, 91.0, 48.0, 95.0) if r["arm"] in keep]
    assert markdown_by_width(rows(records)) == ""
