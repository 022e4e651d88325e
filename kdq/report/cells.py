"""Cells and columns of tables: what each shows of a row, and what it is sorted by."""

import dataclasses
import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from kdq.evaluate.statistics import SEEDS, PairedInterval
from kdq.report import metric as metrics
from kdq.report.aggregate import Mean, Row, has_one_seed
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.tasks import Task

ABSENT = "—"
WIDTH = 120  # characters of a line where there is no terminal to ask


def standard_output() -> Console:
    """Returns where tables are printed: as wide as the terminal, or as COLUMNS says; else 120."""
    console = Console()
    if console.is_terminal:
        return console
    return Console(width=shutil.get_terminal_size((WIDTH, 0)).columns)


def terminal_grid(
    head: Sequence[str] = (), left: Sequence[str] = (), *, overflow: str = "ellipsis"
) -> Table:
    """Returns a table for a terminal, with its columns; those named in `left` are aligned there."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in head:
        grid.add_column(name, justify="left" if name in left else "right", overflow=overflow)
    return grid


def markdown_grid(
    head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]
) -> list[str]:
    """Returns the lines of a Markdown table; columns named in `left` are aligned there."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(":--" if name in left else "--:" for name in head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def escape(text: str) -> str:
    """Makes text literal within a Markdown table cell or list item, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\|`*~])", r"\\\1", text)
    # Only an underscore at a word's edge can start emphasis; a bracket only matters before "(".
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return text.replace("](", r"\](")


def name_a_few(names: Sequence[str], most: int = 3) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def ranges(numbers: Iterable[int]) -> str:
    """Returns "0–2, 5" for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def without_count(text: str) -> str:
    """Returns a text that does not say of each number that it is of one seed."""
    return text.replace(" (n=1)", "").replace(" (one seed)", "")


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
    lines = [
        (reason.strip().splitlines() or ["no reason recorded"])[0] for _, reason in row.failures
    ]
    reasons = "; ".join(dict.fromkeys(x if len(x) <= 80 else x[:79] + "…" for x in lines))
    total = len(row.failures) + len(row.seeds)
    failed = f"failed ({len(row.failures)} of {total} seeds): {reasons}"
    return f"{cell}; {failed}" if row.seeds else failed


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


def _over_seeds_cell(row: Row) -> str:
    """Returns the interval over seeds alone, where the difference has another one."""
    if row.difference is None or row.difference.over == SEEDS:
        return ABSENT
    return _ends(row.difference_over_seeds, row.metric) or ABSENT


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
    for unit, scale in (("nJ", 1.0), ("µJ", 1e3)):
        if nanojoules < 999.5 * scale:
            return f"{nanojoules / scale:.3g} {unit}"
    return ABSENT if math.isnan(nanojoules) else f"{nanojoules / 1e6:.3g} mJ"


def _format_bops(value: float) -> str:
    """Thousands, millions and so on: 12.3M."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return number_cell(value, ".0f")


def _times(ratio: float) -> str:
    return ABSENT if math.isnan(ratio) else f"{ratio:.1f}×"


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table, of arms unless it says so."""

    name: str
    text: Callable[[Any], str]
    sort: Callable[[Any], str | float | None]  # None where nothing was measured


def main_columns(task: "Task") -> dict[str, Column]:
    """Returns the columns of every experiment, in their order in Markdown.

    Keys are the same for every task; other metrics and those of fidelity have their own names.
    """
    metric = task.primary
    seconds = lambda value: number_cell(value, ".1f")
    last = f"Last step {metric.unit}".rstrip()
    smaller = lambda r: "" if math.isnan(r.size_ratio) else f" ({_times(r.size_ratio)})"
    return {
        "arm": text_column("Arm", lambda r: r.arm),
        "kind": text_column("Kind", lambda r: r.kind),
        "bits": text_column("Bits", lambda r: r.bits),
        "params": number_column(
            "Params", lambda r: r.mean("params"), lambda v: number_cell(v, ",.0f")
        ),
        "size": number_column("Size", lambda r: r.size_bytes, format_bytes),
        "smaller": number_column("Smaller", lambda r: r.size_ratio, _times),
        "size_smaller": Column(
            "Size (smaller)",
            lambda r: format_bytes(r.size_bytes) + smaller(r),
            lambda r: _sortable(r.size_bytes),
        ),
        "score": Column(metrics.title(metric), score_cell, lambda r: _sortable(r.score.mean)),
        "difference": Column(
            "Δ [95%]",
            difference_cell,
            lambda r: None if r.difference is None else _sortable(r.difference.mean),
        ),
        "reference": text_column("Δ against", lambda r: r.reference),
        "over_seeds": Column("Over seeds alone", _over_seeds_cell, lambda r: None),
        "p_holm": number_column(
            "p, Holm",
            lambda r: r.p_holm,
            lambda p: "<0.001" if p < 0.001 else number_cell(p, ".3f"),
        ),
        "selected_on": text_column("Selected on", lambda r: r.selected_on),
        "last": metric_column(metric, last, "test_last"),
        **{m.name: metric_column(m) for m in metrics.other_metrics(task)},
        **{m.name: metric_column(m) for m in metrics.fidelity_metrics(task)},
        "bops": number_column("BOPs", lambda r: r.mean("bops"), _format_bops),
        "energy": number_column("Energy, modelled", lambda r: r.energy_modelled_nj, format_energy),
        "train": number_column("Train s", lambda r: r.train_seconds, seconds),
        "compile": number_column("Compile s", lambda r: r.compile_seconds, seconds),
        "seeds": Column("Seeds", lambda r: str(len(r.seeds)), lambda r: len(r.seeds)),
    }


def transfer_columns() -> list[Column]:
    """Returns the columns of `kdq.report.metric.TRANSFER`."""
    return [metric_column(metric, heading) for metric, heading in metrics.TRANSFER.values()]


def text_column(name: str, get: Callable[[Any], str]) -> Column:
    """Returns a column of texts, "—" for an empty one."""
    return Column(name, lambda r: get(r) or ABSENT, get)


def number_column(
    name: str, get: Callable[[Any], float | None], show: Callable[[float], str]
) -> Column:
    """Returns a column of numbers; None and nan were not measured."""
    number = lambda r: math.nan if (value := get(r)) is None else value
    return Column(name, lambda r: show(number(r)), lambda r: _sortable(number(r)))


def metric_column(metric: Metric, heading: str | None = None, split: str = "test") -> Column:
    """Returns the column of a metric's mean over seeds."""
    mean = lambda r: r.mean_of(metric, split)
    return Column(
        heading or metrics.title(metric),
        lambda r: mean_cell(mean(r), metric.decimals),
        lambda r: _sortable(mean(r).mean),
    )


def cells_of(columns: Iterable[Column], table: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the cells of each column; that all arms have one seed is for the notes to say."""
    plain = without_count if has_one_seed(table) else lambda text: text
    return {column.name: [plain(column.text(row)) for row in table] for column in columns}


def _sortable(value: float) -> float | None:
    return None if math.isnan(value) else value
