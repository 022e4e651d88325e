"""What exported files are and do: on a terminal of one arm, as Markdown of a whole experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from kdq.evaluate.statistics import summary
from kdq.report import Record
from kdq.report.aggregate import Mean, number
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


def print_table(found: Mapping[int, Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints a row for each seed and format of what `kdq.experiment.export` returns."""
    table = terminal_grid()
    columns = ("Seed", "Format", "Size", "Accuracy %", "Agreement %", "Δ outputs", "Δ codes")
    for name in columns:
        table.add_column(name, justify="left" if name == "Format" else "right")
    for seed, formats in found.items():
        for name, entry in formats.items():
            if "failed" in entry:
                table.add_row(str(seed), name, *[ABSENT] * (len(columns) - 2))
                continue
            codes = entry.get("max_code_difference")
            table.add_row(
                str(seed),
                name,
                format_bytes(entry["size_bytes"]),
                f"{100 * entry['accuracy']:.2f}",
                f"{100 * entry['argmax_agreement']:.2f}",
                f"{entry['max_logit_difference']:.2g}",
                ABSENT if codes is None else str(codes),
            )
    (console or standard_output()).print(table)


def markdown(records: Sequence[Record]) -> str:
    """A table with a row for each arm and format, over seeds; "" if nothing was exported."""
    entries: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    energy: dict[str, list[float]] = {}
    for record in records:
        energy.setdefault(record["arm"], []).append(number(record, "energy_modelled_nj"))
        for name, entry in record.get("exports", {}).items():
            entries.setdefault((record["arm"], name), []).append(entry)
    if not entries:
        return ""
    sizes = sorted({int(s) for own in entries.values() for e in own for s in _batches(e)})
    times = [name for s in sizes for name in (f"Batch {s}, ms", f"Batch {s}, times faster")]
    smaller = ["Smaller"] if sizes else []
    head = ["Arm", "Format", "Accuracy %", "Agreement %", "Δ codes", "Size", *smaller, *times]
    head.append("Energy, modelled")
    rows = []
    for (arm, name), own in entries.items():
        of = lambda key, own=own: [entry[key] for entry in own if key in entry]
        codes, recommended = of("max_code_difference"), of("recommended")
        cells = [
            escape(arm),
            f"**{name}**" if recommended and all(recommended) else name,
            _mean([100 * value for value in of("accuracy")]),
            _mean([100 * value for value in of("argmax_agreement")]),
            str(max(codes)) if codes else ABSENT,
            format_bytes(summary(of("size_bytes"))[0]),
        ]
        if sizes:
            factors = of("smaller_than_float")
            cells.append(f"{summary(factors)[0]:.1f}×" if factors else ABSENT)
        for size in sizes:
            timed = [_batches(e)[str(size)] for e in own if str(size) in _batches(e)]
            cells += [_mean([t["milliseconds"] for t in timed], 3)]
            cells += [_mean([t["ratio"] for t in timed])]
        cells.append(format_energy(summary(energy[arm])[0]))
        rows.append(cells)
    notes = [
        "Accuracy: of the exported file in its own runtime, on the whole test split.",
        "Agreement: with the class of the simulated model, on held-out examples.",
        "Δ codes: the largest difference of any integer of any layer from integer JAX.",
    ]
    if sizes:
        notes.append(
            "Smaller, times faster: than the same architecture as float in ONNX and ONNX Runtime, "
            "timed beside it. The fastest format of an arm for the first batch size is **bold**."
        )
    lines = markdown_grid(head, rows, left=("Arm", "Format"))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def _batches(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Timings by batch size."""
    return {k: v for k, v in entry.get("latency", {}).items() if k.isdigit()}


def _mean(values: Sequence[float], digits: int = 2) -> str:
    mean, std = summary(values)
    return mean_cell(Mean(mean=mean, std=std, n=len(values)), digits)
