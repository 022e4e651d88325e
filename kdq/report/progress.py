"""A run's progress on the terminal, with the time left; plain lines where there is no terminal."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kdq import experiment, processes

T = TypeVar("T")


@contextlib.contextmanager
def reporter(console: Console | None = None) -> Iterator[experiment.Progress]:
    """What to give `kdq.experiment.run` as its `progress`.

    On a terminal: a bar for the experiment and one for the arm, or for each that is under way.
    Elsewhere (a log file, CI) nothing but what is logged and the final table.
    """
    console = console or Console(file=sys.stderr)
    if not (console.is_terminal and processes.is_first()):
        yield experiment.Progress()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bars(bars)


class _Bar(experiment.Progress):
    """What is under way in one process."""

    def __init__(self, bars: Progress):
        self._bars = bars
        self._steps = bars.add_task("", total=None, visible=False)

    def arm(self, name: str, seeds: Sequence[int], steps: int) -> None:
        described = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
        description = f"{name}, {described}"
        self._bars.reset(self._steps, total=steps, description=description, visible=steps > 0)

    def step(self, step: int) -> None:
        self._bars.update(self._steps, completed=step)

    def method(self, items: Iterable[T], description: str) -> Iterator[T]:
        items = list(items)
        self._bars.reset(self._steps, total=len(items), description=description, visible=True)
        for item in items:
            yield item
            self._bars.advance(self._steps)

    def search(self, name: str, seed: int, evaluations: int) -> None:
        self._searching = f"{name}, seed {seed}"
        self._bars.reset(self._steps, total=evaluations, description=self._searching, visible=True)

    def evaluated(self, count: int, best: str) -> None:
        description = f"{self._searching}: best {best}"
        self._bars.update(self._steps, completed=count, description=description)


class _Bars(_Bar):
    """And how many arms there are."""

    def __init__(self, bars: Progress):
        self._arms = bars.add_task("arms", total=None)
        super().__init__(bars)
        self._others: dict[int, _Bar] = {}

    def start(self, arms: int) -> None:
        self._bars.update(self._arms, total=arms)

    def beside(self, process: int) -> experiment.Progress:
        if process not in self._others:
            self._others[process] = _Bar(self._bars)
        return self._others[process]

    def done(self, record: experiment.Record) -> None:
        self._bars.advance(self._arms)
