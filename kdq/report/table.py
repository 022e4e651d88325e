"""The table of an experiment, as Markdown and on a terminal."""

from collections.abc import Iterable, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from kdq.report import exports
from kdq.report.aggregate import Records, Row, as_records, has_one_seed, rows
from kdq.report.cells import ABSENT, escape, markdown_grid, standard_output, terminal_grid
from kdq.report.columns import Column, cells_of, main_columns, transfer_columns
from kdq.report.metric import TRANSFER, task_of_records
from kdq.report.notes import notes, quick_note, seeds_note

__all__ = ["Row", "markdown", "print_table", "rows"]

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
    task_of_records(records)  # one, or it is refused
    columns = shown_columns(table)
    lines = [f"**{note}**", ""] if (note := quick_note(table)) else []
    lines += _grid(columns.values(), table)
    measured = [name for name in TRANSFER if any(row.values(name) for row in table)]
    if not set(measured) <= EVERYWHERE:
        shown = [TRANSFER[name][1] for name in measured]
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
    place = {key: place for place, key in enumerate(IMPORTANCE)}
    ordered = sorted(measured, key=lambda key: place.get(key, place["energy"] + 0.5))
    shown = _fitting(ordered, widths, console.width)
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
