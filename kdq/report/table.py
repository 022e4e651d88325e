"""The table of an experiment, as Markdown and on a terminal, and its arms by method and width."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from kdq.report import exports
from kdq.report import metric as metrics
from kdq.report.aggregate import Records, Row, as_records, has_one_seed, rows
from kdq.report.cells import (
    ABSENT,
    Column,
    cells_of,
    difference_cell,
    escape,
    main_columns,
    markdown_grid,
    mean_cell,
    standard_output,
    terminal_grid,
    transfer_columns,
)
from kdq.report.notes import coverage, notes, texts

__all__ = ["Row", "markdown", "markdown_by_width", "print_table", "rows"]

# Keys of columns: on a terminal, which come first where there is no room for all (metrics that are
# not listed after the energy), those that stay however narrow it is, and those that may be folded
# to so many characters.
IMPORTANCE = (
    *("arm", "score", "difference", "bits", "size", "reference", "smaller", "train", "seeds"),
    *("kind", "energy", "agreement", "params", "kl_to_teacher", "bops", "compile", "last"),
    *("p_holm", "over_seeds", "selected_on"),
)
OPTIONAL = ("over_seeds", "p_holm")  # left out where no row has them
NEEDED = ("arm", "score", "difference")
FOLDED = {"arm": 32, "score": 24, "reference": 24}
GAP = 2  # between two columns
LEFT = ("Arm", "Kind", "Bits", "Δ against", "Selected on")
EVERYWHERE = {"ece", "agreement_where_teacher_wrong"}  # every record has these


def markdown(table: Sequence[Row], records: Records) -> str:
    """Returns a GitHub-flavoured table, and the notes without which its numbers say little.

    Args:
      table: what `rows` made of `records`.
      records: for the notes: where the numbers came from.
    """
    records = as_records(records)
    metrics.task_of_records(records)  # one, or it is refused
    columns = shown_columns(table)
    lines = [f"**{note}**", ""] if (note := texts().quick(table)) else []
    lines += _grid(columns.values(), table)
    measured = [name for name in metrics.TRANSFER if any(row.values(name) for row in table)]
    if not set(measured) <= EVERYWHERE:
        shown = [metrics.TRANSFER[name][1] for name in measured]
        transferred = [column for column in transfer_columns() if column.name in shown]
        lines += ["", "What was transferred:", "", *_grid([columns["arm"], *transferred], table)]
    lines += ["", *(f"- {escape(note)}" for note in notes(table, records)), ""]
    if exported := exports.markdown(records):
        lines += ["What was exported:", "", exported]
    return "\n".join(lines)


def shown_columns(table: Sequence[Row]) -> dict[str, Column]:
    """Returns the columns of a table, without the optional ones that no row has."""
    return {
        key: column
        for key, column in main_columns(table[0].task).items()
        if key != "size_smaller"
        and not (key in OPTIONAL and all(column.text(row) == ABSENT for row in table))
    }


def _grid(columns: Iterable[Column], table: Sequence[Row]) -> list[str]:
    cells = cells_of(columns, table)
    lines = [[escape(cell) for cell in line] for line in zip(*cells.values(), strict=True)]
    return markdown_grid(list(cells), lines, LEFT)


def print_table(table: Sequence[Row], console: Console | None = None) -> None:
    """Prints the rows, with as many columns as the width has room for, the most important first.

    Args:
      table: what `rows` made of records.
      console: where; None is the standard output.
    """
    console = console or standard_output()
    columns = shown_columns(table)
    cells = dict(zip(columns, cells_of(columns.values(), table).values(), strict=True))
    if has_one_seed(table):
        del cells["seeds"]  # it is said below
    widths = {key: max(map(cell_len, (columns[key].name, *cells[key]))) for key in cells}
    measured = [key for key in cells if any(cell != ABSENT for cell in cells[key])]
    # The most important columns that fit, and those that stay whether they do or not.
    place = {key: place for place, key in enumerate(IMPORTANCE)}
    shown, taken = set(), 0
    for key in sorted(measured, key=lambda key: place.get(key, place["energy"] + 0.5)):
        taken += min(widths[key], FOLDED.get(key, widths[key])) + GAP
        if taken > console.width and key not in NEEDED:
            break
        shown.add(key)
    roomy = sum(widths[key] + GAP for key in shown) <= console.width
    grid = terminal_grid()
    for key in (key for key in cells if key in shown):
        # An interval or a size broken over two lines is hard to read; a name or a reason is not.
        keep, name = roomy or key not in FOLDED, columns[key].name
        justify = "left" if name in LEFT else "right"
        grid.add_column(name, justify=justify, overflow="fold", no_wrap=keep)
    for i in range(len(table)):
        # Text, not str: rich would read the brackets of an interval or a name as its own markup.
        grid.add_row(*(Text(cells[key][i]) for key in cells if key in shown))
    console.print(grid)
    if left_out := [columns[k].name for k in cells if k in measured and k not in shown]:
        console.print(Text(f"Not shown at this width: {'; '.join(left_out)}."))
    if note := texts().seeds(table):
        console.print(Text(note))
    if note := texts().quick(table):
        console.print(Text(note, style="bold"))


def markdown_by_width(table: Sequence[Row]) -> str:
    """Returns the metric by method and width, and the difference to each arm's reference.

    The shape in which many quantized arms can be read: a method a row, a width a column. A method
    is the name of an arm without its bits: "w4a4_gptq" and "gptq_w4a4" are "gptq" at W4A4. In each
    column the best is bold. "" if no method is there at two widths or more.

    Args:
      table: what `rows` made of the records.
    """
    methods: dict[str, dict[str, Row]] = {}
    for row in table:
        if row.family not in ("", row.arm):
            methods.setdefault(row.family, {})[row.bits] = row
    methods = {method: by_bits for method, by_bits in methods.items() if len(by_bits) > 1}
    if not methods:
        return ""
    metric = table[0].metric
    widths = list(dict.fromkeys(bits for by_bits in methods.values() for bits in by_bits))
    best = max if metric.higher_is_better else min
    bests = {
        bits: best(rows[bits].score.mean for rows in methods.values() if bits in rows)
        for bits in widths
    }

    def score(row: Row) -> str:
        cell = mean_cell(row.score, metric.decimals)
        return f"**{cell}**" if row.score.mean == bests[row.bits] else cell

    def grid(cell: Callable[[Row], str], against: bool = False) -> list[str]:
        left = ["Method", *(["against"] if against else [])]
        lines = []
        for method, by_bits in methods.items():
            # The arms that it is compared with, without their bits.
            others = [dataclasses.replace(r, arm=r.reference or ABSENT) for r in by_bits.values()]
            names = [", ".join(sorted({other.family for other in others}))] if against else []
            cells = [cell(by_bits[bits]) if bits in by_bits else ABSENT for bits in widths]
            lines.append([*map(escape, (method, *names)), *cells])
        return markdown_grid([*left, *widths], lines, left)

    first, second = texts().by_width(metric, coverage(table)).splitlines()
    differences = grid(lambda row: escape(difference_cell(row)), against=True)
    return "\n".join([first, "", *grid(score), "", second, "", *differences, ""])
