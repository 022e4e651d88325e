"""A method a row and a width a column: the shape in which many quantized arms can be read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from kdq.report import metric as metrics
from kdq.report.aggregate import Row
from kdq.report.cells import ABSENT, difference_cell, escape, markdown_grid, mean_cell
from kdq.report.notes import coverage

ByMethod = Mapping[str, Mapping[str, Row]]


def markdown(table: Sequence[Row]) -> str:
    """Returns the metric by method and width, and the difference to each arm's reference.

    A method is the name of an arm without its bits: "w4a4_gptq" and "gptq_w4a4" are "gptq" at W4A4.
    In each column the best is bold. "" if no method is there at two widths or more.

    Args:
      table: what `kdq.report.table.rows` made of the records.
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

    return "\n".join(
        (
            f"Test {metrics.named(metric)}{metrics.in_unit(metric)}, mean ± standard deviation "
            "over seeds; best of a width bold.",
            "",
            *_grid(methods, widths, score),
            "",
            f"Difference to the arm named first in the row, {metric.difference_unit}, with its "
            f"paired 95% interval {coverage(table)}; \\* excludes 0.",
            "",
            *_grid(methods, widths, lambda row: escape(difference_cell(row)), against=True),
            "",
        )
    )


def _grid(
    methods: ByMethod, widths: Sequence[str], cell: Callable[[Row], str], against: bool = False
) -> list[str]:
    left = ["Method", *(["against"] if against else [])]
    lines = []
    for method, rows in methods.items():
        reference = [_reference(rows)] if against else []
        cells = [cell(rows[bits]) if bits in rows else ABSENT for bits in widths]
        lines.append([escape(method), *reference, *cells])
    return markdown_grid([*left, *widths], lines, left)


def _reference(rows: Mapping[str, Row]) -> str:
    """Returns the arm that a method is compared with, without its bits."""
    named = (dataclasses.replace(row, arm=row.reference or ABSENT) for row in rows.values())
    return escape(", ".join(sorted({row.family for row in named})))
