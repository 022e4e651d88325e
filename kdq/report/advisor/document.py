"""A report of text, tables and commands, with citations: as Markdown and on a terminal.

A template writes it as lines, each of which begins with what it is; `Document` reads these.
"""

import dataclasses
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from kdq.report.advisor.study import Candidate
from kdq.report.cells import ABSENT, escape, markdown_grid, terminal_grid
from kdq.report.notes import environment

# The first word of a line in the template -> kind of a block. "@" begins a table with its head, in
# which "<" marks columns that are aligned left; "|" adds a row to it.
MARKS = {"!": "strong", ".": "text", "-": "item", "$": "command", "@": "grid"}
BAR = "\ufdd0"  # no character, instead of the "|" of a value, which begins no cell


@dataclasses.dataclass(kw_only=True)
class Block:
    """One paragraph, heading, command or table."""

    kind: str  # "heading" or one of MARKS
    text: str = ""
    level: int = 1  # of a heading
    head: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    left: tuple[str, ...] = ()  # columns that are aligned left


class Document:
    """The blocks that a template writes, with numbered citations."""

    def __init__(self, template: str, **values: Any):
        """Renders `template` with `values`, and with the functions `cite` and `cited`.

        A value can't begin a block or a cell: the ends of its lines become spaces.
        """
        self._cited: dict[tuple[str, str], Candidate] = {}
        templates = environment(
            autoescape=False,  # text, which each way of showing it escapes
            finalize=lambda value: " ".join(str(value).splitlines()).replace("|", BAR),
        )
        templates.globals |= {"cite": self._cite, "cited": self._cited.values}
        text = templates.get_template(template).render(values)
        self.blocks: list[Block] = []
        for line in filter(str.strip, text.splitlines()):
            mark, _, rest = line.partition(" ")
            cells = tuple(cell.strip().replace(BAR, "|") for cell in rest.split("|"))
            rest = rest.replace(BAR, "|")
            if set(mark) == {"#"}:
                self.blocks.append(Block(kind="heading", text=rest, level=len(mark)))
            elif mark == "@":
                head = tuple(cell.removeprefix("<") for cell in cells)
                left = tuple(cell[1:] for cell in cells if cell.startswith("<"))
                self.blocks.append(Block(kind="grid", head=head, left=left))
            elif mark == "|":
                self.blocks[-1].rows.append(cells)
            elif mark == "$" and self.blocks[-1].kind == "command":
                self.blocks[-1].text += f"\n{rest}"
            else:
                self.blocks.append(Block(kind=MARKS[mark], text=rest))
        for block in self.blocks:
            # A column in which nothing was measured is left out.
            columns = zip(block.head, *block.rows, strict=True)
            kept = [c for c in columns if any(cell not in (ABSENT, "") for cell in c[1:])]
            block.head, *block.rows = list(zip(*kept, strict=True)) or [()]

    def _cite(self, cited: Sequence[Candidate]) -> str:
        """Returns numbers in brackets, of rows that the template lists in the end."""
        for arm in cited:
            self._cited.setdefault((arm.source.path, arm.arm), arm)
        places = {key: place for place, key in enumerate(self._cited, 1)}
        numbers = dict.fromkeys(places[arm.source.path, arm.arm] for arm in cited)
        return f"[{', '.join(map(str, numbers))}]"

    def markdown(self) -> str:
        """Returns the whole report."""
        lines: list[str] = []
        for before, block in itertools.pairwise([None, *self.blocks]):
            if before is not None and not (before.kind == block.kind == "item"):
                lines.append("")
            if block.kind == "grid":
                cells = [list(map(escape, row)) for row in block.rows]
                lines += markdown_grid(block.head, cells, block.left)
            elif block.kind == "command":
                lines += ["```", block.text, "```"]
            else:
                around = {"heading": f"{'#' * block.level} %s", "strong": "**%s**", "item": "- %s"}
                lines.append(around.get(block.kind, "%s") % escape(block.text))
        return "\n".join([*lines, ""])

    def print(self, console: Console) -> None:
        """Prints the whole report on a terminal."""
        for before, block in itertools.pairwise([None, *self.blocks]):
            if before is not None and not (before.kind == block.kind == "item"):
                console.print()
            # Text, not str: rich would read the brackets of an interval as its own markup.
            if block.kind == "grid":
                grid = terminal_grid(block.head, block.left, overflow="fold")
                for row in block.rows:
                    grid.add_row(*map(Text, row))
                console.print(grid)
            elif block.kind == "command":
                console.print(Text(textwrap.indent(block.text, "    ")), soft_wrap=True)
            else:
                mark = {"heading": "#" * block.level + " ", "item": "- "}.get(block.kind, "")
                style = "bold" if block.kind in ("heading", "strong") else ""
                console.print(Text(mark + block.text, style=style))
