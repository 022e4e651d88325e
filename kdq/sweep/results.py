"""Results of a sweep: one list of records, one table."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from kdq import experiment
from kdq.config import ConfigError, to_json
from kdq.experiment.sharing import Shared
from kdq.experiment.store import Store
from kdq.files import read_json, write_atomic, write_json
from kdq.record import ArmRecord
from kdq.report import table
from kdq.report.cells import escape, standard_output
from kdq.sweep.runs import SHARED, Run


def records_of(run: Run) -> list[ArmRecord]:
    """Those that the run's folder has, in the order of the table.

    Raises ConfigError if one was made with another config.
    """
    return [r for r in experiment.finished(run.experiment, run.folder) if r.arm in run.arms]


def offer_arms(runs: Sequence[Run], workdir: Path) -> None:
    """Lets runs that are not finished copy the arms that others have trained before."""
    for run in runs:
        store = Store(run.experiment, run.folder)
        shared = Shared(workdir / SHARED, run.experiment, store)
        for record in records_of(run):
            shared.offer(record)


def is_finished(run: Run) -> bool:
    """Returns whether the run, started again, would find all that it makes.

    Raises ConfigError as `records_of` does.
    """
    records, export = records_of(run), run.experiment.export
    if len(records) < len(run.arms) * len(run.experiment.seeds):
        return False
    for record in records:
        exported = record.status == "ok" and record.arm in (export.arms or run.arms)
        if exported and not set(export.formats) <= set(record.exports):
            return False
    report = run.folder / "results.json"  # of launch/compress.py
    if run.arm or not report.is_file():
        return bool(run.arm)
    try:
        return [ArmRecord.from_json(document) for document in read_json(report)] == records
    except (ConfigError, TypeError):  # damaged
        return False  # the run writes it again


def write(runs: Sequence[Run], failed: Mapping[str, str], workdir: Path) -> None:
    """Writes results.json and table.md to `workdir` and prints the table.

    Runs whose experiments differ in nothing but their seeds (by the digest of all the rest) are
    seeds of the same rows; if there are several experiments, a row's arm is "LABEL/ARM".
    `failed` says what went wrong, by the name of the run.
    """
    documents: list[dict[str, Any]] = []
    groups: dict[str, list[dict[str, Any]]] = {}
    labels = {run.digest: run.label for run in reversed(runs)}
    for run in runs:
        run_documents = [record.to_json() for record in records_of(run)]
        origin = {"run": run.name, "overrides": to_json(run.overrides)}
        documents += [{**origin, **record} for record in run_documents]
        groups.setdefault(run.digest, []).extend(run_documents)
    write_json(workdir / "results.json", documents)
    rows, shown = [], []
    for digest, run_documents in groups.items():
        prefix = f"{labels[digest]}/" if len(groups) > 1 else ""
        for row in table.rows(run_documents) if run_documents else []:
            reference = row.reference and prefix + row.reference
            rows.append(dataclasses.replace(row, arm=prefix + row.arm, reference=reference))
        shown += [{**record, "arm": prefix + record["arm"]} for record in run_documents]
    copied, every = (
        collections.Counter(each["arm"] for each in some)
        for some in ([d for d in documents if "shared_from" in d], documents)
    )
    said = ", ".join(f"{arm} ({count} of {every[arm]})" for arm, count in copied.items())
    same = "the same in several runs, trained in one of them and copied by the others"
    copied = f"Arms that are {same}: {said}." if said else ""
    lines = [f"- {escape(copied)}"] if copied else []
    lines += [f"- Run {escape(name)} failed: {escape(why)}." for name, why in failed.items()]
    markdown = table.markdown(rows, shown) if rows else "No arm of any run is finished.\n"
    write_atomic(workdir / "table.md", "\n".join([markdown, *lines, ""]).encode())
    if rows:
        table.print_table(rows)
    if copied:
        print(copied)
    if rows:
        where = f"Table: {workdir / 'table.md'}; of each run: {workdir / 'runs'}/NAME"
        standard_output().print(Text(where), soft_wrap=True)
