"""A report of text, tables and commands, with citations: as Markdown and on a terminal.

A template writes it as lines, each of which begins with what it is; `Document` reads these.
"""

import dataclasses
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import jinja2
from rich.console import Console
from rich.text import Text

from kdq.report.advisor.study import Candidate
from kdq.report.advisor.words import ranges
from kdq.report.aggregate import distinct, distinct_text
from kdq.report.cells import ABSENT, escape, markdown_grid, terminal_grid

# The first word of a line in the template -> kind of a block.
MARKS = {"!": "strong", ".": "text", "-": "item", "$": "command", "@": "grid"}
Line = tuple[Sequence[str], Sequence[Candidate]]  # cells of a table, and what supports them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One paragraph, heading, command or table."""

    kind: str  # "heading" or one of MARKS
    text: str = ""
    level: int = 1  # of a heading
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    left: tuple[str, ...] = ()  # columns that are aligned left


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of findings; the column "Rows" is added, with what supports each line."""

    head: Sequence[str]
    left: Sequence[str]  # columns that are aligned left
    lines: Sequence[Line]


class Document:
    """The blocks that a template of `kdq.report.advisor` writes, with numbered citations."""

    def __init__(self, template: str, **values: Any):
        """Renders `template` with `values`, and with the functions `cite`, `grid` and `references`.

        A value can't begin a block: the ends of its lines become spaces.
        """
        self._cited: dict[tuple[str, str], Candidate] = {}
        self._grids: list[Block] = []
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("kdq.report.advisor", "template"),
            autoescape=False,  # text, which each way of showing it escapes
            undefined=jinja2.StrictUndefined,
            finalize=lambda value: " ".join(str(value).splitlines()),
            trim_blocks=True,
            lstrip_blocks=True,
        )
        functions = {"cite": self._cite, "grid": self._grid, "references": self._references}
        text = environment.get_template(template).render(**functions, **values)
        self.blocks = tuple(self._read(text))

    def _read(self, text: str) -> list[Block]:
        blocks: list[Block] = []
        for line in filter(str.strip, text.splitlines()):
            mark, _, rest = line.partition(" ")
            if set(mark) == {"#"}:
                blocks.append(Block(kind="heading", text=rest, level=len(mark)))
            elif mark == "@":
                blocks.append(self._grids[int(rest)])
            elif mark == "$" and blocks[-1].kind == "command":
                blocks[-1] = Block(kind="command", text=f"{blocks[-1].text}\n{rest}")
            else:
                blocks.append(Block(kind=MARKS[mark], text=rest))
        return blocks

    def _cite(self, cited: Sequence[Candidate]) -> str:
        """Returns numbers in brackets, which `references` explains."""
        for arm in cited:
            self._cited.setdefault((arm.source.path, arm.arm), arm)
        places = {key: place for place, key in enumerate(self._cited, 1)}
        numbers = dict.fromkeys(places[arm.source.path, arm.arm] for arm in cited)
        return f"[{', '.join(map(str, numbers))}]"

    def _grid(self, table: Table) -> str:
        lines = [(*cells, self._cite(cited) if cited else "") for cells, cited in table.lines]
        return self._add_grid((*table.head, "Rows"), lines, (*table.left, "Rows"))

    def _add_grid(
        self, head: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[str]
    ) -> str:
        """Returns the line of a table; a column in which nothing was measured is left out."""
        kept = [i for i in range(len(head)) if any(line[i] not in (ABSENT, "") for line in lines)]
        self._grids.append(
            Block(
                kind="grid",
                head=tuple(head[i] for i in kept),
                rows=tuple(tuple(line[i] for i in kept) for line in lines),
                left=tuple(left),
            )
        )
        return f"@ {len(self._grids) - 1}"

    def _references(self) -> str:
        """Returns the table of all rows that have been cited: where each number comes from."""
        return self._add_grid(
            ("No.", "Arm", "Records", "Seeds", "Config digest", "Commit", "Trained on"),
            [
                (
                    str(i),
                    arm.arm,
                    arm.source.path,
                    ranges(arm.seeds),
                    distinct_text(arm.runs, "config_digest"),
                    " and ".join(c[:12] for c in distinct(arm.runs, "commit")) or "not recorded",
                    distinct_text(arm.runs, "device"),
                )
                for i, arm in enumerate(self._cited.values(), 1)
            ],
            ("Arm", "Records", "Config digest", "Commit", "Trained on"),
        )

    def markdown(self) -> str:
        """Returns the whole report."""
        lines: list[str] = []
        for before, block in itertools.pairwise([None, *self.blocks]):
            if before is not None and not (before.kind == block.kind == "item"):
                lines.append("")
            lines += _markdown(block)
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


def find_section(blocks: Sequence[Block], title: str) -> list[Block]:
    """Returns the blocks below the first heading of that text, up to the next heading."""
    starts = [i for i, b in enumerate(blocks, 1) if (b.kind, b.text) == ("heading", title)]
    after = blocks[starts[0] :] if starts else ()
    return list(itertools.takewhile(lambda block: block.kind != "heading", after))
