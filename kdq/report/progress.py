"""A run's progress on the terminal, with the time left; plain lines where there is no terminal."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence

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
from kdq.report.lines import Lines, named


@contextlib.contextmanager
def reporter(console: Console | None = None) -> Iterator[experiment.Progress]:
    """Yields the `progress` to give to `kdq.experiment.run`.

    On a terminal: a bar for the experiment and one for the arm, or for each that is under way.
    Elsewhere (a pipe, a log file, CI): a line where an arm ends, and now and then while it lasts.
    """
    if not processes.is_first():
        yield experiment.Progress()
        return
    if console is None:
        # Beside the output proper, unless that is read by something else.
        terminals = sys.stdout.isatty() and sys.stderr.isatty()
        console = Console(file=sys.stderr if terminals else sys.stdout)
    if not console.is_terminal:
        yield Lines(console.file)
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
    """A bar of what is under way in one process."""

    def __init__(self, bars: Progress):
        self._bars = bars
        self._steps = bars.add_task("", total=None, visible=False)

    def arm(self, name: str, seeds: Sequence[int], steps: int) -> None:
        self._reset(named(name, seeds), steps, visible=steps > 0)

    def step(self, step: int) -> None:
        self._bars.update(self._steps, completed=step)

    def stage(self, description: str, done: int, total: int) -> None:
        if done == 0:
            self._reset(description, total)
        self._bars.update(self._steps, completed=done)

    def search(self, name: str, seed: int, evaluations: int) -> None:
        self._searching = named(name, [seed])
        self._reset(self._searching, evaluations)

    def evaluated(self, count: int, best: str) -> None:
        description = f"{self._searching}: best {best}"
        self._bars.update(self._steps, completed=count, description=description)

    def _reset(self, description: str, total: int, visible: bool = True) -> None:
        self._bars.reset(self._steps, total=total, description=description, visible=visible)


class _Bars(_Bar):
    """And how many arms there are."""

    def __init__(self, bars: Progress):
        self._arms = bars.add_task("arms", total=None)
        super().__init__(bars)
        self._others: dict[int, _Bar] = {}

    def start(self, steps: Mapping[experiment.Unit, int | None]) -> None:
        self._bars.update(self._arms, total=len(steps))

    def beside(self, process: int) -> experiment.Progress:
        if process not in self._others:
            self._others[process] = _Bar(self._bars)
        return self._others[process]

    def done(self, record: experiment.ArmRecord) -> None:
        self._bars.advance(self._arms)
