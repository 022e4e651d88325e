"""The table of an experiment, as Markdown and on a terminal."""

import math
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from kdq.report import Record, exports
from kdq.report.aggregate import Row, rows
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
from kdq.report.notes import notes

__all__ = ["Row", "markdown", "print_table", "rows"]

Column = tuple[str, Callable[[Row], str], int]


def markdown(table: Sequence[Row], records: Sequence[Record]) -> str:
    """A GitHub-flavoured table, followed by the notes without which its numbers say little.

    Args:
      table: what `rows` made of `records`.
      records: for the notes: where the numbers came from.
    """
    lines = _grid([(name, cell) for name, cell, _ in COLUMNS], table)
    found = [entry for entry in TRANSFER if any(row.measures[entry[1]].n for row in table)]
    if not {key for _, key, _ in found} <= EVERYWHERE:
        lines += ["", "What was transferred:", ""]
        lines += _grid([("Arm", lambda r: r.arm), *((n, cell) for n, _, cell in found)], table)
    lines += ["", *(f"- {escape(note)}" for note in notes(table, records)), ""]
    if files := exports.markdown(records):
        lines += ["What was exported:", "", files]
    return "\n".join(lines)


def _grid(columns: Sequence[tuple[str, Callable[[Row], str]]], table: Sequence[Row]) -> list[str]:
    cells = [[escape(cell(row)) for _, cell in columns] for row in table]
    return markdown_grid([name for name, _ in columns], cells, LEFT)


def print_table(table: Sequence[Row], console: Console | None = None) -> None:
    """Prints the rows; a terminal too narrow for every column gets the ones that matter most.

    Args:
      table: what `rows` made of records.
      console: where; None is the standard output.
    """
    console = console or standard_output()
    width = console.width
    grid = terminal_grid()
    shown = [column for column in COLUMNS if column[2] <= width]
    for name, _, _ in shown:
        left = name in LEFT
        # An interval or a size broken over two lines is hard to read; a name or a reason is not.
        keep = name not in ("Arm", "Accuracy %")
        grid.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=keep)
    for row in table:
        # Text, not str: rich would read the brackets of an interval or a name as its own markup.
        grid.add_row(*(Text(cell(row)) for _, cell, _ in shown))
    console.print(grid)
    if len(shown) < len(COLUMNS):
        left_out = ", ".join(name for name, _, least in COLUMNS if least > width)
        console.print(Text(f"Not shown at this width: {left_out}."))


def accuracy_cell(row: Row) -> str:
    """Mean and spread, or why there is none."""
    if not row.failures:
        return mean_cell(row.accuracy)
    reasons = "; ".join(dict.fromkeys(_first_line(reason) for _, reason in row.failures))
    total = len(row.failures) + len(row.seeds)
    failed = f"failed ({len(row.failures)} of {total} seeds): {reasons}"
    return f"{mean_cell(row.accuracy)}; {failed}" if row.seeds else failed


def _first_line(reason: str, limit: int = 80) -> str:
    line = reason.strip().splitlines()[0] if reason.strip() else "no reason recorded"
    return line if len(line) <= limit else line[: limit - 1] + "…"


def difference_cell(row: Row) -> str:
    """The difference to the reference with its interval, marked where that excludes 0; or why there
    is none. "—" is of an arm that is compared with no other."""
    difference = row.difference
    if difference is None:
        return row.no_difference or ABSENT
    if difference.n == 1:
        return f"{difference.mean:+.2f} (n=1)"
    marker = "*" if difference.excludes_zero else ""
    pairs = f" (n={difference.n})" if difference.n < len(row.seeds) else ""
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]{marker}{pairs}"


def _plain(value: float, form: str) -> str:
    return ABSENT if math.isnan(value) else format(value, form)


def _bops(value: float) -> str:
    if math.isnan(value):
        return ABSENT
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


# Name, cell, and the narrowest terminal (columns) that shows it.
COLUMNS: tuple[Column, ...] = (
    ("Arm", lambda r: r.arm, 0),
    ("Kind", lambda r: r.kind or ABSENT, 120),
    ("Bits", lambda r: r.bits or ABSENT, 0),
    ("Params", lambda r: _plain(r.params, ",.0f"), 140),
    ("Size", lambda r: format_bytes(r.size_bytes), 0),
    ("Smaller", lambda r: ABSENT if math.isnan(r.size_ratio) else f"{r.size_ratio:.1f}×", 100),
    ("Accuracy %", accuracy_cell, 0),
    ("Δ [95%]", difference_cell, 0),
    ("Δ against", lambda r: r.reference or ABSENT, 100),
    ("Selected on", lambda r: r.selected_on or ABSENT, 140),
    ("Last step %", lambda r: mean_cell(r.accuracy_last), 160),
    ("Agreement %", lambda r: mean_cell(r.agreement), 160),
    ("KL", lambda r: mean_cell(r.kl_to_teacher, 4), 180),
    ("BOPs", lambda r: _bops(r.bops), 140),
    ("Energy, modelled", lambda r: format_energy(r.energy_modelled_nj), 180),
    ("Train s", lambda r: _plain(r.train_seconds, ".1f"), 140),
    ("Seeds", lambda r: str(len(r.seeds)), 120),
)
# Name, the measure's key, cell: a second table, where there is more than every record has.
TRANSFER: tuple[tuple[str, str, Callable[[Row], str]], ...] = tuple(
    (name, key, lambda r, key=key, digits=digits: mean_cell(r.measures[key], digits))
    for name, key, digits in (
        ("ECE %", "ece", 2),
        ("Agreement where teacher is wrong %", "agreement_where_teacher_wrong", 1),
        ("Attribution cosine", "attribution_cosine", 3),
        ("Attribution rank", "attribution_rank", 3),
        ("Agreement on paths %", "path_agreement", 1),
        ("Agreement after adversarial step %", "adversarial_agreement", 1),
        ("Accuracy with bias corrected %", "accuracy_corrected", 2),
    )
)
EVERYWHERE = {"ece", "agreement_where_teacher_wrong"}
LEFT = ("Arm", "Kind", "Bits", "Δ against", "Selected on")
