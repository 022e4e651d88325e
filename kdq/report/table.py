"""The table of an experiment, as Markdown and on a terminal."""

from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from kdq.report import exports
from kdq.report.aggregate import Records, Row, as_records, has_one_seed, rows
from kdq.report.cells import ABSENT, escape, markdown_grid, standard_output, terminal_grid
from kdq.report.columns import Column, cells_of, main_columns, transfer_columns
from kdq.report.metric import TRANSFER
from kdq.report.notes import notes, quick_note, seeds_note

__all__ = ["Row", "markdown", "print_table", "rows"]

# Keys of columns, and on a terminal: which come first where there is no room for all, those that
# stay however narrow it is, and those that may be folded to so many characters.
SHOWN = (
    *("arm", "kind", "bits", "params", "size", "smaller", "score", "difference", "reference"),
    *("selected_on", "last", "agreement", "kl", "bops", "energy", "train", "compile", "seeds"),
)
IMPORTANCE = (
    *("arm", "score", "difference", "bits", "size", "reference", "smaller", "train", "seeds"),
    *("kind", "energy", "agreement", "params", "kl", "bops", "compile", "last", "selected_on"),
)
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
    records, columns = as_records(records), main_columns(table[0].metric)
    lines = [f"**{note}**", ""] if (note := quick_note(table)) else []
    lines += _grid([columns[key] for key in SHOWN], table)
    measured = [name for name in TRANSFER if any(row.values(name) for row in table)]
    if not set(measured) <= EVERYWHERE:
        shown = [TRANSFER[name][1] for name in measured]
        transferred = [column for column in transfer_columns() if column.name in shown]
        lines += ["", "What was transferred:", "", *_grid([columns["arm"], *transferred], table)]
    lines += ["", *(f"- {escape(note)}" for note in notes(table, records)), ""]
    if exported := exports.markdown(records):
        lines += ["What was exported:", "", exported]
    return "\n".join(lines)


def _grid(columns: Sequence[Column], table: Sequence[Row]) -> list[str]:
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
    columns = main_columns(table[0].metric)
    texts = list(cells_of([columns[key] for key in SHOWN], table).values())
    cells = dict(zip(SHOWN, texts, strict=True))
    if has_one_seed(table):
        del cells["seeds"]  # it is said below
    widths = {key: max(map(cell_len, (columns[key].name, *cells[key]))) for key in cells}
    measured = {key for key in cells if any(cell != ABSENT for cell in cells[key])}
    shown = _fitting([key for key in IMPORTANCE if key in measured], widths, console.width)
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
    if note := seeds_note(table):
        console.print(Text(note))
    if note := quick_note(table):
        console.print(Text(note, style="bold"))


def _fitting(keys: Sequence[str], widths: Mapping[str, int], room: int) -> set[str]:
    """Returns the first columns that fit, and those of NEEDED whether they do or not."""
    chosen, taken = set(), 0
    for key in keys:
        taken += min(widths[key], FOLDED.get(key, widths[key])) + GAP
        if taken > room and key not in NEEDED:
            break
        chosen.add(key)
    return chosen
