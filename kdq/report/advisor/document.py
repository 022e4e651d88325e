"""A report of text, tables and commands, with citations: as Markdown and on a terminal."""

import dataclasses
import itertools
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from kdq.report.advisor.evidence import Candidate
from kdq.report.cells import ABSENT, escape, markdown_grid, terminal_grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One paragraph, heading, command or table."""

    kind: str  # "heading", "strong", "text", "item", "command" or "grid"
    text: str = ""
    level: int = 1  # of a heading
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    left: tuple[str, ...] = ()  # columns that are aligned left


class Document:
    """Collects what is said, in order, and numbers the rows of evidence that it cites."""

    def __init__(self):
        self._blocks: list[Block] = []
        self._cited: dict[tuple[str, str], Candidate] = {}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What has been said so far, in order."""
        return tuple(self._blocks)

    def heading(self, text: str, level: int = 1) -> None:
        """Starts a section."""
        self._blocks.append(Block(kind="heading", text=text, level=level))

    def say(self, text: str, *cited: Candidate, kind: str = "text") -> None:
        """Adds a paragraph, an "item" of a list, or a "strong" paragraph, with what supports it."""
        cites = f" {self.cite(*cited)}" if cited else ""
        self._blocks.append(Block(kind=kind, text=text + cites))

    def command(self, text: str) -> None:
        """Adds what to type."""
        self._blocks.append(Block(kind="command", text=text))

    def grid(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()
    ) -> None:
        """Adds a table; a column in which nothing was measured is left out."""
        empty = (ABSENT, "")
        kept = [i for i in range(len(head)) if any(row[i] not in empty for row in rows)]
        cells = tuple(tuple(row[i] for i in kept) for row in rows)
        names = tuple(head[i] for i in kept)
        self._blocks.append(Block(kind="grid", head=names, rows=cells, left=tuple(left)))

    def cite(self, *cited: Candidate) -> str:
        """Numbers in brackets, which `references` explains."""
        for one in cited:
            self._cited.setdefault((one.source.path, one.arm), one)
        known = list(self._cited)
        numbers = dict.fromkeys(known.index((one.source.path, one.arm)) + 1 for one in cited)
        return f"[{', '.join(map(str, numbers))}]"

    def references(self) -> None:
        """Adds the table of all rows that have been cited: where each number comes from."""
        self.grid(
            ("No.", "Arm", "Records", "Seeds", "Config digest", "Commit", "Trained on"),
            [
                (
                    str(i),
                    one.arm,
                    one.source.path,
                    ranges(one.seeds),
                    one.digest,
                    " and ".join(commit[:12] for commit in one.commit.split(" and ")),
                    one.device,
                )
                for i, one in enumerate(self._cited.values(), 1)
            ],
            left=("Arm", "Records", "Config digest", "Commit", "Trained on"),
        )

    def markdown(self) -> str:
        """The whole report."""
        lines: list[str] = []
        for before, block in itertools.pairwise([None, *self._blocks]):
            if before is not None and not (before.kind == block.kind == "item"):
                lines.append("")
            lines += _markdown(block)
        return "\n".join([*lines, ""])

    def print(self, console: Console) -> None:
        """The whole report on a terminal."""
        for before, block in itertools.pairwise([None, *self._blocks]):
            if before is not None and not (before.kind == block.kind == "item"):
                console.print()
            # Text, not str: rich would read the brackets of an interval as its own markup.
            if block.kind == "grid":
                console.print(_terminal(block))
            elif block.kind == "command":
                console.print(Text(textwrap.indent(block.text, "    ")), soft_wrap=True)
            elif block.kind == "item":
                console.print(Text("- " + block.text))
            else:
                style = "bold" if block.kind in ("heading", "strong") else ""
                mark = "#" * block.level + " " if block.kind == "heading" else ""
                console.print(Text(mark + block.text, style=style))


def _markdown(block: Block) -> list[str]:
    text = escape(block.text)
    if block.kind == "grid":
        cells = [[escape(cell) for cell in row] for row in block.rows]
        return markdown_grid(block.head, cells, block.left)
    return {
        "heading": [f"{'#' * block.level} {text}"],
        "strong": [f"**{text}**"],
        "text": [text],
        "item": [f"- {text}"],
        "command": ["```", block.text, "```"],
    }[block.kind]


def _terminal(block: Block):
    grid = terminal_grid()
    for name in block.head:
        grid.add_column(name, justify="left" if name in block.left else "right", overflow="fold")
    for row in block.rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid


def ranges(numbers: Sequence[int]) -> str:
    """0–2, 5 for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)
