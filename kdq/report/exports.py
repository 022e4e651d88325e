"""What exported files are and do, on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kdq.report.table import format_bytes, standard_output


def print_table(found: Mapping[int, Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints a row for each seed and format of what `kdq.experiment.export` returns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    columns = ("Seed", "Format", "Size", "Accuracy %", "Agreement %", "Δ outputs", "Δ codes")
    for name in columns:
        table.add_column(name, justify="left" if name == "Format" else "right")
    for seed, formats in found.items():
        for name, entry in formats.items():
            codes = entry.get("max_code_difference")
            table.add_row(
                str(seed),
                name,
                format_bytes(entry["size_bytes"]),
                f"{100 * entry['accuracy']:.2f}",
                f"{100 * entry['argmax_agreement']:.2f}",
                f"{entry['max_logit_difference']:.2g}",
                "—" if codes is None else str(codes),
            )
    (console or standard_output()).print(table)
