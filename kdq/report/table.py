"""The table of an experiment, as Markdown and on a terminal."""

import math
from collections.abc import Callable, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from kdq.report import Record, exports
from kdq.report.aggregate import Row, one_seed, rows
from kdq.report.cells import (
    ABSENT,
    escape,
    format_bytes,
    format_energy,
    markdown_grid,
    mean_cell,
    standard_output,
    terminal_grid,
    without_count,
)
from kdq.report.notes import notes, quick_note, seeds_note

__all__ = ["Row", "markdown", "print_table", "rows"]

Column = tuple[str, Callable[[Row], str]]


def markdown(table: Sequence[Row], records: Sequence[Record]) -> str:
    """A GitHub-flavoured table, followed by the notes without which its numbers say little.

    Args:
      table: what `rows` made of `records`.
      records: for the notes: where the numbers came from.
    """
    lines = [f"**{said}**", ""] if (said := quick_note(table)) else []
    lines += _grid(COLUMNS, table)
    found = [entry for entry in TRANSFER if any(row.measures[entry[1]].n for row in table)]
    if not {key for _, key, _ in found} <= EVERYWHERE:
        lines += ["", "What was transferred:", ""]
        lines += _grid([("Arm", lambda r: r.arm), *((n, cell) for n, _, cell in found)], table)
    lines += ["", *(f"- {escape(note)}" for note in notes(table, records)), ""]
    if files := exports.markdown(records):
        lines += ["What was exported:", "", files]
    return "\n".join(lines)


def _grid(columns: Sequence[Column], table: Sequence[Row]) -> list[str]:
    by_name = cells_of(columns, table)
    rows_ = [[escape(cell) for cell in row] for row in zip(*by_name.values(), strict=True)]
    return markdown_grid(list(by_name), rows_, LEFT)


def cells_of(columns: Sequence[Column], table: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the cells of each column; that all arms have one seed is for the notes to say."""
    plain = without_count if one_seed(table) else lambda text: text
    return {name: [plain(cell(row)) for row in table] for name, cell in columns}


def print_table(table: Sequence[Row], console: Console | None = None) -> None:
    """Prints the rows, with as many columns as the width has room for, the most important first.

    Args:
      table: what `rows` made of records.
      console: where; None is the standard output.
    """
    console = console or standard_output()
    cells = cells_of(COLUMNS, table)
    if one_seed(table):
        del cells["Seeds"]  # it is said below
    shown = _fitting(cells, console.width)
    grid = terminal_grid()
    roomy = sum(_width(name, cells[name]) + GAP for name in shown) <= console.width
    for name in shown:
        # An interval or a size broken over two lines is hard to read; a name or a reason is not.
        keep = roomy or name not in FOLDED
        justify = "left" if name in LEFT else "right"
        grid.add_column(name, justify=justify, overflow="fold", no_wrap=keep)
    for i in range(len(table)):
        # Text, not str: rich would read the brackets of an interval or a name as its own markup.
        grid.add_row(*(Text(cells[name][i]) for name in shown))
    console.print(grid)
    if left_out := [name for name in cells if name not in shown and _is_measured(cells[name])]:
        console.print(Text(f"Not shown at this width: {'; '.join(left_out)}."))
    if said := seeds_note(table):
        console.print(Text(said))
    if said := quick_note(table):
        console.print(Text(said, style="bold"))


def _fitting(cells: Mapping[str, Sequence[str]], width: int) -> list[str]:
    """The columns that fit, in their order; those of NEEDED whether they do or not."""
    chosen, taken = set(), 0
    for name in filter(lambda name: _is_measured(cells.get(name, ())), IMPORTANCE):
        natural = _width(name, cells[name])
        taken += min(natural, FOLDED.get(name, natural)) + GAP
        if taken > width and name not in NEEDED:
            break
        chosen.add(name)
    return [name for name in cells if name in chosen]


def _width(name: str, cells: Sequence[str]) -> int:
    return max(map(cell_len, (name, *cells)))


def _is_measured(cells: Sequence[str]) -> bool:
    return any(cell != ABSENT for cell in cells)


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
        return f"{_signed(difference.mean)} (n=1)"
    marker = "*" if difference.excludes_zero else ""
    pairs = f" (n={difference.n})" if difference.n < len(row.seeds) else ""
    interval = f"[{_signed(difference.low)}, {_signed(difference.high)}]"
    return f"{_signed(difference.mean)} {interval}{marker}{pairs}"


def _signed(points: float) -> str:
    return f"{round(points, 2) + 0.0:+.2f}"  # 0 has one sign


def _plain(value: float, form: str) -> str:
    return ABSENT if math.isnan(value) else format(value, form)


def _bops(value: float) -> str:
    if math.isnan(value):
        return ABSENT
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


COLUMNS: tuple[Column, ...] = (
    ("Arm", lambda r: r.arm),
    ("Kind", lambda r: r.kind or ABSENT),
    ("Bits", lambda r: r.bits or ABSENT),
    ("Params", lambda r: _plain(r.params, ",.0f")),
    ("Size", lambda r: format_bytes(r.size_bytes)),
    ("Smaller", lambda r: ABSENT if math.isnan(r.size_ratio) else f"{r.size_ratio:.1f}×"),
    ("Accuracy %", accuracy_cell),
    ("Δ [95%]", difference_cell),
    ("Δ against", lambda r: r.reference or ABSENT),
    ("Selected on", lambda r: r.selected_on or ABSENT),
    ("Last step %", lambda r: mean_cell(r.accuracy_last)),
    ("Agreement %", lambda r: mean_cell(r.agreement)),
    ("KL", lambda r: mean_cell(r.kl_to_teacher, 4)),
    ("BOPs", lambda r: _bops(r.bops)),
    ("Energy, modelled", lambda r: format_energy(r.energy_modelled_nj)),
    ("Train s", lambda r: _plain(r.train_seconds, ".1f")),
    ("Compile s", lambda r: _plain(r.compile_seconds, ".1f")),
    ("Seeds", lambda r: str(len(r.seeds))),
)
# On a terminal: which columns come first where there is no room for all, those that stay however
# narrow it is, and those that may be folded to so many characters.
IMPORTANCE = (
    *("Arm", "Accuracy %", "Δ [95%]", "Bits", "Size", "Δ against", "Smaller", "Train s", "Seeds"),
    *("Kind", "Energy, modelled", "Agreement %", "Params", "KL", "BOPs", "Compile s"),
    *("Last step %", "Selected on"),
)
NEEDED = ("Arm", "Accuracy %", "Δ [95%]")
FOLDED = {"Arm": 32, "Accuracy %": 24, "Δ against": 24}
GAP = 2  # between two columns
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
