"""The files of a report: strict JSON, and all or nothing."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from kdq import files
from kdq.report.write import write_report


def _refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def _record(**fields):
    return {
        "arm": "a",
        "seed": 0,
        "status": "ok",
        "kind": "student",
        "bits": "fp32",
        "accuracy": 0.9,
        "size_bytes": 1000,
    } | fields


def test_report_is_a_page_with_its_tables_and_a_printed_table(tmp_path):
    out = io.StringIO()
    records = [
        _record(nll=math.nan, kl=math.inf, steps=np.int64(3), sizes=(np.float32(0.5), {1: 2}))
    ]
    write_report(records, tmp_path / "new", Console(file=out, width=100))
    names = sorted(p.name for p in (tmp_path / "new").iterdir())
    tables = ["table.csv", "table.md", "table.tex"]
    assert names == ["plots", "report.html", "results.json", *tables]
    plots = sorted(p.name for p in (tmp_path / "new" / "plots").iterdir())
    assert plots == ["accuracy_vs_size.png", "accuracy_vs_size.svg"]
    text = (tmp_path / "new" / "results.json").read_text()
    json.loads(text, parse_constant=_refuse)
    (read,) = files.read_json(tmp_path / "new" / "results.json")
    assert read == _record(nll=None, kl=None, steps=3, sizes=[0.5, {"1": 2}])
    assert " 90.00 " in out.getvalue()
    folder = tmp_path / "new"
    places = ", ".join(str(folder / f"table.{end}") for end in ("md", "csv", "tex"))
    assert out.getvalue().endswith(f"Report: {folder / 'report.html'}; tables: {places}\n")
    assert "| 90.00 |" in (tmp_path / "new" / "table.md").read_text()


def test_a_report_can_be_made_again_from_its_own_json(tmp_path):
    quiet = Console(file=io.StringIO())
    write_report([_record(nll=math.nan, agreement=math.nan)], tmp_path, quiet)
    table = (tmp_path / "table.md").read_text()
    write_report(json.loads((tmp_path / "results.json").read_text()), tmp_path, quiet)
    assert (tmp_path / "table.md").read_text() == table


def test_records_that_cannot_be_written_leave_the_old_report(tmp_path):
    quiet = Console(file=io.StringIO())
    write_report([_record()], tmp_path, quiet)
    files = lambda: {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    before = files()
    with pytest.raises(TypeError):
        write_report([_record(model=object())], tmp_path, quiet)
    with pytest.raises(ValueError, match="no records"):
        write_report([], tmp_path, quiet)
    assert files() == before
