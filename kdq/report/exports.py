"""Exported files: a table on a terminal of one arm, and as Markdown of a whole experiment."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from kdq.evaluate.statistics import summary
from kdq.report import metric as metrics
from kdq.report.aggregate import Mean, Records, as_records, number
from kdq.report.cells import (
    ABSENT,
    escape,
    format_bytes,
    format_energy,
    markdown_grid,
    mean_cell,
    standard_output,
    terminal_grid,
)
from kdq.report.notes import texts
from kdq.tasks.metric import Metric

AGREEMENT = Metric(name="argmax_agreement", scores=(), unit="%")  # of an exported file's class

Entry = Mapping[str, Any]


def print_table(
    exports: Mapping[int, Mapping[str, Entry]], metric: Metric, console: Console | None = None
) -> None:
    """Prints a row for each seed and format of what `kdq.experiment.export` returns.

    Args:
      exports: seed -> format -> what was measured of the file.
      metric: of the arm's task.
      console: where; None is the standard output.
    """
    head = ("Seed", "Format", "Size", metrics.title(metric), "Agreement %", "Δ outputs", "Δ codes")
    grid = terminal_grid(head, ("Format",))
    shown = lambda entry, each: each.number(entry[each.name]) if each.name in entry else ABSENT
    for seed, formats in exports.items():
        for name, entry in formats.items():
            cells = [ABSENT] * (len(head) - 2)
            if "failed" not in entry:
                codes = entry.get("max_code_difference")
                cells = [format_bytes(entry["size_bytes"])]
                cells += [shown(entry, each) for each in (metric, AGREEMENT)]
                cells += [f"{entry['max_logit_difference']:.2g}"]
                cells += [ABSENT if codes is None else str(codes)]
            grid.add_row(str(seed), name, *cells)
    (console or standard_output()).print(grid)


def markdown(records: Records) -> str:
    """Returns a table with a row for each arm and format; "" if nothing was exported."""
    entries: dict[tuple[str, str], list[Entry]] = {}
    energy: dict[str, list[float]] = {}
    records = as_records(records)
    task = metrics.task_of_records(records)
    for record in records:
        energy.setdefault(record.arm, []).append(number(record, "energy_modelled_nj"))
        for name, entry in record.exports.items():
            entries.setdefault((record.arm, name), []).append(entry)
    if not entries:
        return ""
    sizes = sorted({int(size) for runs in entries.values() for e in runs for size in _batches(e)})
    times = [name for s in sizes for name in (f"Batch {s}, ms", f"Batch {s}, times faster")]
    head = ["Arm", "Format", metrics.title(task.primary), "Agreement %", "Δ codes", "Size"]
    head += [*(["Smaller"] if sizes else []), *times, "Energy, modelled"]
    lines = [
        [*_cells(arm, name, runs, sizes, task.primary), format_energy(summary(energy[arm])[0])]
        for (arm, name), runs in entries.items()
    ]
    table = markdown_grid(head, lines, left=("Arm", "Format"))
    notes = texts().exports(task, bool(sizes)).splitlines()
    return "\n".join([*table, "", *(f"- {note}" for note in notes), ""])


def _cells(arm: str, name: str, runs: list[Entry], sizes: list[int], metric: Metric) -> list[str]:
    """Returns the cells of an arm and format, over seeds."""
    values = lambda field: [entry[field] for entry in runs if field in entry]
    mean = lambda numbers, digits=2: mean_cell(Mean.over(numbers), digits)
    codes, recommended = values("max_code_difference"), values("recommended")
    cells = [
        escape(arm),
        f"**{name}**" if recommended and all(recommended) else name,
        mean(map(metric.shown, values(metric.name)), metric.decimals),
        mean(map(AGREEMENT.shown, values(AGREEMENT.name))),
        str(max(codes)) if codes else ABSENT,
        format_bytes(summary(values("size_bytes"))[0]),
    ]
    if sizes:
        factors = values("smaller_than_float")
        cells.append(f"{summary(factors)[0]:.1f}×" if factors else ABSENT)
    for size in sizes:
        timed = [_batches(e)[str(size)] for e in runs if str(size) in _batches(e)]
        cells += [mean((t["milliseconds"] for t in timed), 3), mean(t["ratio"] for t in timed)]
    return cells


def _batches(entry: Entry) -> dict[str, Entry]:
    """Returns timings by batch size."""
    return {k: v for k, v in entry.get("latency", {}).items() if k.isdigit()}
