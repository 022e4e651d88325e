"""A run's progress: bars on a terminal; plain lines, with the time left, where there is none."""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

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
from kdq.report import metric as metrics
from kdq.report.aggregate import number
from kdq.report.cells import terminal_grid

EVERY = 20.0  # s between two lines of one arm
LEAST = 3  # arms that must have ended before the time left is estimated, of fewer half
OVERHEAD = 100  # steps: what starting, packing and measuring an arm takes, roughly


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
        *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bars(bars)


class _Bar(experiment.Progress):
    """A bar of what is under way in one process."""

    def __init__(self, bars: Progress):
        self._bars = bars
        self._steps = bars.add_task("", total=None, visible=False)

    def arm(self, name: str, seeds: Sequence[int], steps: int) -> None:
        self._reset(_named(name, seeds), steps, visible=steps > 0)

    def step(self, step: int) -> None:
        self._bars.update(self._steps, completed=step)

    def stage(self, description: str, done: int, total: int) -> None:
        if done == 0:
            self._reset(description, total)
        self._bars.update(self._steps, completed=done)

    def search(self, name: str, seed: int, evaluations: int) -> None:
        self._searching = _named(name, [seed])
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


class _Line(experiment.Progress):
    """Lines about what is under way in one process."""

    def __init__(self, file: TextIO, begun: dict[experiment.Unit, float]):
        self._file, self._begun = file, begun
        self._what, self._total = "", 0
        self._restart()

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self._file, flush=True)

    def _restart(self) -> None:
        """From here on the time that is left is estimated, and the next line is due."""
        self._since, self._done_then = time.monotonic(), 0
        self._said = self._since

    def prepare(self, name: str, seed: int) -> None:
        self._begun[name, seed] = time.monotonic()
        self._what = _named(name, [seed])
        self._restart()

    def arm(self, name: str, seeds: Sequence[int], steps: int) -> None:
        self._what, self._total = _named(name, seeds), steps
        if steps:
            self._say(f"{self._what}: {steps:,} steps")
        self._restart()

    def step(self, step: int) -> None:
        if not self._done_then:  # the first one was compiled for, or it goes on from a checkpoint
            self._since, self._done_then = time.monotonic(), step
        self._tell("step {} of {}", step, self._total)

    def stage(self, description: str, done: int, total: int) -> None:
        if done == 0:
            self._since, self._done_then = time.monotonic(), 0
        self._tell(f"{description}: {{}} of {{}}", done, total)

    def search(self, name: str, seed: int, evaluations: int) -> None:
        self._what, self._total = _named(f"search {name}", [seed]), evaluations
        self._say(f"{self._what}: {evaluations:,} evaluations")
        self._restart()

    def evaluated(self, count: int, best: str) -> None:
        self._tell("{} of {} evaluations", count, self._total, f"; best {best}")

    def _tell(self, form: str, done: int, total: int, more: str = "") -> None:
        """Says how far it is, if nothing has been said for a while."""
        now = time.monotonic()
        if now - self._said < EVERY:
            return
        self._said = now
        said = form.format(f"{done:,}", f"{total:,}")
        if done > self._done_then and done < total:
            left = (now - self._since) * (total - done) / (done - self._done_then)
            said += f", about {span(left)} left"
        self._say(f"{self._what}: {said}{more}" if self._what else f"{said}{more}")


class Lines(_Line):
    """And what has ended, of how many, with the time that is left."""

    def __init__(self, file: TextIO):
        super().__init__(file, {})
        self._others: dict[int, _Line] = {}
        self._all = 0
        self._left: dict[experiment.Unit, int] = {}  # of what is not done: its weight
        self._paces: list[float] = []  # seconds for a weight of one

    def start(self, steps: Mapping[experiment.Unit, int | None]) -> None:
        self._left = {unit: n + OVERHEAD for unit, n in steps.items() if n is not None}
        self._all = len(steps)
        before = len(steps) - len(self._left)
        done = f", {before if self._left else 'all'} of them done before" if before else ""
        what = "arms and seeds" if len(steps) > 1 else "arm and seed"
        self._say(f"{len(steps)} {what} to run{done}")

    def beside(self, process: int) -> experiment.Progress:
        if process not in self._others:
            self._others[process] = _Line(self._file, self._begun)
        return self._others[process]

    def done(self, record: experiment.ArmRecord) -> None:
        unit = record.arm, record.seed
        weight = self._left.pop(unit, None)
        if weight is None:
            return  # it had been run before
        now = time.monotonic()
        took = now - self._begun.pop(unit, now)
        if record.status == "ok":
            copied = record.shared_from
            if not copied:
                compiled = record.compile_seconds or 0.0
                self._paces.append(max(0.0, took - compiled) / weight)
            metric = metrics.metric_of_records([record])
            score = number(record, metric.name, "validation")
            how = f", copied from {copied}" if copied else f" after {span(took)}"
            said = f"{metric.text(score)} on validation{how}"
        else:
            reason = str(record.error).removeprefix(f"arm {unit[0]}, seed {unit[1]}: ")
            said = f"FAILED after {span(took)}: {' '.join(reason.split())}"
        if self._left and len(self._paces) >= min(LEAST, self._all // 2):
            # By the median pace: the first arms compile what the others share.
            at_once = min(max(1, len(self._others)), len(self._left))
            seconds = statistics.median(self._paces) * sum(self._left.values()) / at_once
            said += f"; about {span(seconds)} left"
        place = self._all - len(self._left)
        self._say(f"[{place}/{self._all}] {_named(unit[0], [unit[1]])}: {said}")


def _named(name: str, seeds: Sequence[int]) -> str:
    return f"{name}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def span(seconds: float) -> str:
    """Returns a length of time as people say it: 12 s, 34 min, 5.6 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def print_profile(profile: experiment.Profile, top: int, console: Console | None = None) -> None:
    """Prints the time of a step, and its `top` dearest operations."""
    console = console or Console()
    table = terminal_grid(("Operation", "ms a step", "Share %"), ("Operation",), overflow="fold")
    table.title, table.title_justify = "Dearest operations", "left"
    whole = sum(profile.costs.values())
    for name, ms in list(profile.costs.items())[:top]:
        table.add_row(name, f"{ms:.3f}", f"{100 * ms / whole:.1f}")
    console.print(table)
    console.print(
        f"{profile.step:.3f} ms a step of the loop, {100 * profile.outside:.1f}% of it outside the "
        f"compiled step. Trace: {profile.trace}",
        soft_wrap=True,
    )
