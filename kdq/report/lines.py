"""A run's progress as plain lines, for pipes and log files."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from kdq import experiment
from kdq.report import metric as metrics
from kdq.report.aggregate import number

EVERY = 20.0  # s between two lines of one arm
LEAST = 3  # arms that must have ended before the time left is estimated, of fewer half
OVERHEAD = 100  # steps: what starting, packing and measuring an arm takes, roughly


def named(name: str, seeds: Sequence[int]) -> str:
    """Returns an arm or a search with its seeds."""
    return f"{name}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


class _Line(experiment.Progress):
    """Lines about what is under way in one process."""

    def __init__(self, say: Callable[[str], None], begun: dict[experiment.Unit, float]):
        self._say, self._begun = say, begun
        self._what, self._total = "", 0
        self._restart()

    def _restart(self) -> None:
        """From here on the time that is left is estimated, and the next line is due."""
        self._since, self._done_then = time.monotonic(), 0
        self._said = self._since

    def prepare(self, name: str, seed: int) -> None:
        self._begun[name, seed] = time.monotonic()
        self._what = named(name, [seed])
        self._restart()

    def arm(self, name: str, seeds: Sequence[int], steps: int) -> None:
        self._what, self._total = named(name, seeds), steps
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
        self._what, self._total = named(f"search {name}", [seed]), evaluations
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
        self._file = file
        super().__init__(self._print, {})
        self._others: dict[int, _Line] = {}
        self._all = 0
        self._left: dict[experiment.Unit, int] = {}  # of what is not done: its weight
        self._paces: list[float] = []  # seconds for a weight of one

    def _print(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self._file, flush=True)

    def start(self, steps: Mapping[experiment.Unit, int | None]) -> None:
        self._left = {unit: n + OVERHEAD for unit, n in steps.items() if n is not None}
        self._all = len(steps)
        before = len(steps) - len(self._left)
        done = f", {before if self._left else 'all'} of them done before" if before else ""
        what = "arms and seeds" if len(steps) > 1 else "arm and seed"
        self._say(f"{len(steps)} {what} to run{done}")

    def beside(self, process: int) -> experiment.Progress:
        if process not in self._others:
            self._others[process] = _Line(self._print, self._begun)
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
        place = self._all - len(self._left)
        self._say(f"[{place}/{self._all}] {named(unit[0], [unit[1]])}: {said}{self._time_left()}")

    def _time_left(self) -> str:
        """By the median pace: the first arms compile what the others share."""
        if not self._left or len(self._paces) < min(LEAST, self._all // 2):
            return ""
        at_once = min(max(1, len(self._others)), len(self._left))
        seconds = statistics.median(self._paces) * sum(self._left.values()) / at_once
        return f"; about {span(seconds)} left"


def span(seconds: float) -> str:
    """Returns a length of time as people say it: 12 s, 34 min, 5.6 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
