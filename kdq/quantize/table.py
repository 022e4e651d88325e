"""Plain tables."""

from collections.abc import Sequence


def aligned(table: Sequence[Sequence[str]], *, numbers: int) -> list[str]:
    """Lines: text to the left, the last `numbers` columns to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = len(widths) - numbers
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if i >= text else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
