"""A method a row and a width a column: the shape in which many quantized arms can be read."""

import dataclasses
from collections.abc import Callable, Sequence

from kdq.report.aggregate import Row
from kdq.report.cells import ABSENT, escape, mean_cell
from kdq.report.table import difference_cell


def markdown(table: Sequence[Row]) -> str:
    """Accuracy [%] by method and width, and the difference to each arm's reference.

    A method is the name of an arm without its bits: "w4a4_gptq" and "gptq_w4a4" are "gptq" at W4A4.
    In each column the best accuracy is bold. "" if no method is there at two widths or more.

    Args:
      table: what `kdq.report.table.rows` made of the records.
    """
    found: dict[str, dict[str, Row]] = {}
    for row in table:
        if row.method not in ("", row.arm):
            found.setdefault(row.method, {})[row.bits] = row
    found = {method: by_bits for method, by_bits in found.items() if len(by_bits) > 1}
    if not found:
        return ""
    widths = list(dict.fromkeys(bits for by_bits in found.values() for bits in by_bits))
    best = {
        bits: max(own[bits].accuracy.mean for own in found.values() if bits in own)
        for bits in widths
    }

    def accuracy(row: Row) -> str:
        cell = mean_cell(row.accuracy)
        return f"**{cell}**" if row.accuracy.mean == best[row.bits] else cell

    return "\n".join(
        (
            "Test accuracy, percent, mean ± standard deviation over seeds; best of a width bold.",
            "",
            *_grid(found, widths, accuracy),
            "",
            "Difference to the arm named first in the row, points, with its paired 95% interval; "
            "\\* excludes 0.",
            "",
            *_grid(found, widths, lambda row: escape(difference_cell(row)), against=True),
            "",
        )
    )


def _grid(
    found: dict[str, dict[str, Row]],
    widths: Sequence[str],
    cell: Callable[[Row], str],
    against: bool = False,
) -> list[str]:
    lines = [
        "| Method | " + ("against | " if against else "") + " | ".join(widths) + " |",
        "|:--|" + (":--|" if against else "") + "--:|" * len(widths),
    ]
    for method, by_bits in found.items():
        cells = [cell(by_bits[bits]) if bits in by_bits else ABSENT for bits in widths]
        reference = [_reference(by_bits)] if against else []
        lines.append("| " + " | ".join([escape(method), *reference, *cells]) + " |")
    return lines


def _reference(by_bits: dict[str, Row]) -> str:
    """The arm that a method is compared with, without its bits."""
    names = {dataclasses.replace(r, arm=r.reference or ABSENT).method for r in by_bits.values()}
    return escape(", ".join(sorted(names)))
