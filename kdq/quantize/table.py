"""Plain tables."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def aligned(rows: Sequence[Sequence[str]], *, numbers: int) -> list[str]:
    """Lines: text to the left, the last `numbers` columns to the right."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for i in range(count := len(rows[0])):
        table.add_column(justify="right" if i >= count - numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: "stack[0]" is a path
    console = Console(width=10_000, color_system=None, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]
