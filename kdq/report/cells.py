"""Numbers and texts as cells of tables."""

import math
import re
import shutil
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kdq.report.aggregate import Mean

ABSENT = "—"
WIDTH = 120  # characters of a line where there is no terminal to ask


def escape(text: str) -> str:
    """Makes text literal within a Markdown table cell or list item, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\|`*~])", r"\\\1", text)
    # Only an underscore at a word's edge can start emphasis; a bracket only matters before "(".
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return text.replace("](", r"\](")


def markdown_grid(
    head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]
) -> list[str]:
    """The lines of a Markdown table; columns that are named in `left` are aligned there."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(":--" if name in left else "--:" for name in head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def without_count(text: str) -> str:
    """A text in which it is not said of each number that it is of one seed."""
    return text.replace(" (n=1)", "").replace(" (one seed)", "")


def terminal_grid() -> Table:
    """An empty table for a terminal."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def mean_cell(value: Mean, digits: int = 2) -> str:
    """Mean and spread; "—" of nothing."""
    if value.n == 0:
        return ABSENT
    spread = "(n=1)" if value.n == 1 else f"± {value.std:.{digits}f}"
    return f"{value.mean:.{digits}f} {spread}"


def format_bytes(size: float) -> str:
    """Kibibytes up to a mebibyte: 12.3 KiB, 4.56 MiB."""
    if math.isnan(size):
        return ABSENT
    if size < 1024:
        return f"{size:.0f} B"
    return f"{size / 1024:.1f} KiB" if size < 1024**2 else f"{size / 1024**2:.2f} MiB"


def format_energy(nanojoules: float) -> str:
    """Nanojoules up to a microjoule, and so on: 12.3 nJ, 4.56 µJ, 7.8 mJ."""
    if math.isnan(nanojoules):
        return ABSENT
    for unit, scale in (("nJ", 1.0), ("µJ", 1e3)):
        if nanojoules < 999.5 * scale:
            return f"{nanojoules / scale:.3g} {unit}"
    return f"{nanojoules / 1e6:.3g} mJ"


def standard_output() -> Console:
    """Where tables are printed: as wide as the terminal, or as COLUMNS says; else 120."""
    console = Console()
    if console.is_terminal:
        return console
    return Console(width=shutil.get_terminal_size((WIDTH, 0)).columns)
