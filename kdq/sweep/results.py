"""What the runs of a sweep left: one list of records, one table."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from kdq import experiment
from kdq.config import to_json
from kdq.files import write_atomic
from kdq.report import table
from kdq.report.cells import escape, standard_output
from kdq.report.write import strict
from kdq.sweep.runs import Run

Record = dict[str, Any]


def records_of(run: Run) -> list[Record]:
    """Those that the run's folder has, in the order of the table.

    Raises ConfigError if one was made with another config.
    """
    return [r for r in experiment.finished(run.experiment, run.folder) if r["arm"] in run.arms]


def is_finished(run: Run) -> bool:
    """Whether the run, started again, would find all that it makes, by the checks it makes itself.

    Raises ConfigError as `records_of` does.
    """
    found, wanted = records_of(run), run.experiment.export
    if len(found) < len(run.arms) * len(run.experiment.seeds):
        return False
    for record in found:
        exported = record["status"] == "ok" and record["arm"] in (wanted.arms or run.arms)
        if exported and not set(wanted.formats) <= set(record.get("exports", {})):
            return False
    report = run.folder / "results.json"  # of launch/compress.py
    return bool(run.arm) or (report.is_file() and json.loads(report.read_text()) == found)


def write(runs: Sequence[Run], failed: Mapping[str, str], workdir: Path) -> None:
    """Writes results.json and table.md to `workdir` and prints the table.

    Runs whose experiments differ in nothing but their seeds (by the digest of all the rest) are
    seeds of the same rows; if there are several experiments, a row's arm is "LABEL/ARM".

    Args:
      runs: of a sweep.
      failed: what went wrong, by the name of the run.
      workdir: of the sweep; each file is replaced atomically.
    """
    records: list[Record] = []
    groups: dict[str, list[Record]] = {}
    labels = {run.digest: run.label for run in reversed(runs)}
    for run in runs:
        found = records_of(run)
        told = {"run": run.name, "overrides": to_json(run.overrides)}
        records += [{**told, **record} for record in found]
        groups.setdefault(run.digest, []).extend(found)
    text = json.dumps(strict(records), indent=1, allow_nan=False)
    write_atomic(workdir / "results.json", f"{text}\n".encode())
    rows, shown = [], []
    for digest, found in groups.items():
        prefix = f"{labels[digest]}/" if len(groups) > 1 else ""
        rows += [_named(row, prefix) for row in (table.rows(found) if found else [])]
        shown += [{**record, "arm": prefix + record["arm"]} for record in found]
    lines = [f"- Run {escape(name)} failed: {escape(why)}." for name, why in failed.items()]
    markdown = table.markdown(rows, shown) if rows else "No arm of any run is finished.\n"
    write_atomic(workdir / "table.md", "\n".join([markdown, *lines, ""]).encode())
    if rows:
        table.print_table(rows)
        where = f"Table: {workdir / 'table.md'}; of each run: {workdir / 'runs'}/NAME"
        standard_output().print(Text(where), soft_wrap=True)


def _named(row: table.Row, prefix: str) -> table.Row:
    reference = row.reference and prefix + row.reference
    return dataclasses.replace(row, arm=prefix + row.arm, reference=reference)
