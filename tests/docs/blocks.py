"""The code blocks of README.md and docs/, and the commands in them."""

import dataclasses
import re
import shlex
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"(?:^[ ]*<!-- not run: (?P<reason>[^>]+?) -->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
INLINE = re.compile(r"`(python launch/[^`]+)`")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; `reason` says why it is not run, where it is not."""

    page: str
    line: int  # of the code's first line, from 1
    language: str
    code: str
    reason: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(text: str, page: str) -> list[Block]:
    """The blocks of a page, in order."""
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start("code")) + 1,
            language=found["language"].strip(),
            code=textwrap.dedent(found["code"]),
            reason=found["reason"] or "",
        )
        for found in FENCE.finditer(text)
    ]


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block, in words: without comments, `&&` and line breaks."""
    words = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    found: list[list[str]] = []
    for line in words:
        for part in " ".join(shlex.quote(word) for word in line).split(" '&&' "):
            if part:
                found.append(shlex.split(part))
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


ALL = [block for path in PAGES for block in blocks(path.read_text(), name(path))]
INLINE_COMMANDS = [
    (name(path), shlex.split(" ".join(text.split())))
    for path in PAGES
    for text in INLINE.findall(path.read_text())
]
