"""A progress bar on a terminal, silence in a log file."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yields `items`, `total` of them, under a progress bar where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield from items
    else:
        yield from rich_track(
            items, description, total=total, console=Console(stderr=True), transient=True
        )
