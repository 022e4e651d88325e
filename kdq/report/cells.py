"""Numbers and texts as cells of tables."""

import math
import re
import shutil
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kdq.evaluate.statistics import SEEDS, PairedInterval
from kdq.report.aggregate import Mean, Row
from kdq.tasks.metric import Metric

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
    """Returns the lines of a Markdown table; columns named in `left` are aligned there."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(":--" if name in left else "--:" for name in head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def without_count(text: str) -> str:
    """Returns a text that does not say of each number that it is of one seed."""
    return text.replace(" (n=1)", "").replace(" (one seed)", "")


def terminal_grid(
    head: Sequence[str] = (), left: Sequence[str] = (), *, overflow: str = "ellipsis"
) -> Table:
    """Returns a table for a terminal, with its columns; those named in `left` are aligned there."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in head:
        grid.add_column(name, justify="left" if name in left else "right", overflow=overflow)
    return grid


def number_cell(value: float, form: str) -> str:
    """Returns a number; "—" of nan."""
    return ABSENT if math.isnan(value) else format(value, form)


def mean_cell(value: Mean, digits: int = 2) -> str:
    """Returns mean and spread; "—" of nothing."""
    if value.n == 0:
        return ABSENT
    spread = "(n=1)" if value.n == 1 else f"± {value.std:.{digits}f}"
    return f"{value.mean:.{digits}f} {spread}"


def score_cell(row: Row) -> str:
    """Returns mean and spread of an arm's metric, or why there is none."""
    cell = mean_cell(row.score, row.metric.decimals)
    if not row.failures:
        return cell
    reasons = "; ".join(dict.fromkeys(_first_line(reason) for _, reason in row.failures))
    total = len(row.failures) + len(row.seeds)
    failed = f"failed ({len(row.failures)} of {total} seeds): {reasons}"
    return f"{cell}; {failed}" if row.seeds else failed


def _first_line(reason: str, limit: int = 80) -> str:
    line = reason.strip().splitlines()[0] if reason.strip() else "no reason recorded"
    return line if len(line) <= limit else line[: limit - 1] + "…"


def difference_cell(row: Row) -> str:
    """Returns the difference to the reference with its interval, marked where that excludes 0.

    Or why there is none; "—" is of an arm that is compared with no other.
    """
    difference = row.difference
    if difference is None:
        return row.no_difference or ABSENT
    pairs = f" (n={difference.n})" if difference.n < len(row.seeds) or difference.n == 1 else ""
    mean = _signed(difference.mean, row.metric)
    return " ".join(filter(None, (mean, _ends(difference, row.metric)))) + pairs


def over_seeds_cell(row: Row) -> str:
    """Returns the interval over seeds alone, where the difference has another one."""
    if row.difference is None or row.difference.over == SEEDS:
        return ABSENT
    return _ends(row.difference_over_seeds, row.metric) or ABSENT


def p_value_cell(row: Row) -> str:
    """Returns the difference's p-value, corrected for the number of comparisons."""
    return "<0.001" if row.p_holm < 0.001 else number_cell(row.p_holm, ".3f")


def _ends(interval: PairedInterval, metric: Metric) -> str:
    """Returns the ends of an interval, marked where they exclude 0; "" where there is none."""
    if math.isnan(interval.low):
        return ""
    low, high = _signed(interval.low, metric), _signed(interval.high, metric)
    return f"[{low}, {high}]{'*' if interval.excludes_zero else ''}"


def _signed(value: float, metric: Metric) -> str:
    # Rounded first: a difference of nothing has one sign.
    return metric.difference_number(round(value, metric.decimals) + 0.0)


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


def format_bops(value: float) -> str:
    """Thousands, millions and so on: 12.3M."""
    if math.isnan(value):
        return ABSENT
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


def standard_output() -> Console:
    """Returns where tables are printed: as wide as the terminal, or as COLUMNS says; else 120."""
    console = Console()
    if console.is_terminal:
        return console
    return Console(width=shutil.get_terminal_size((WIDTH, 0)).columns)
