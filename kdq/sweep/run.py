"""Runs a sweep by an executor, and tells what failed."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeElapsedColumn,
)
from rich.text import Text

from kdq import lock
from kdq.sweep import results
from kdq.sweep.job import Executor, Job
from kdq.sweep.runs import Run

TAIL = 10  # lines of a log that are shown


def run(runs: Sequence[Run], executor: Executor, workdir: Path) -> bool:
    """Runs what is not finished, writes the table of what is there, and says whether all went well.

    Ctrl-C and SIGTERM stop everything that runs and raise KeyboardInterrupt; what is done stays
    done, and the same sweep goes on from there.

    Raises:
      ConfigError: a run's folder holds another config's results, or another sweep writes in
        `workdir`; nothing has been started then.
    """
    waiting = {planned.name: planned for planned in runs if not results.is_finished(planned)}
    failed: dict[str, str] = {}
    if waiting:
        results.offer_arms(runs, workdir)
    jobs = [planned.job for planned in waiting.values()]
    with (
        lock.hold(workdir, alone=True),
        _interruptible(),
        reporter(jobs, len(runs) - len(jobs)) as ended,
        contextlib.closing(executor(jobs) if jobs else (_ for _ in ())) as ends,
    ):
        for job, problem in ends:
            ended(job.name, problem)
            if problem:
                failed[job.name] = problem
    results.write(runs, failed, workdir)
    for name, problem in failed.items():
        log = waiting[name].job.log
        print(f"\nrun {name} failed: {problem}; the end of {log}:", file=sys.stderr)
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else ["(no log)"]
        print("\n".join(lines[-TAIL:]), file=sys.stderr)
    return not failed


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def reporter(
    jobs: Sequence[Job], done: int, console: Console | None = None
) -> Iterator[Callable[[str, str], None]]:
    """Yields a function to call with the name of a job that ended and its problem ("" for none).

    A bar on a terminal, a line a run elsewhere. `done` runs were finished before.
    """
    console = console or Console(file=sys.stderr, soft_wrap=True)
    failed, left, total = [], {job.name: job for job in jobs}, done + len(jobs)
    state = _State(left, failed)
    columns = (BarColumn(), MofNCompleteColumn(), state, TimeElapsedColumn())
    visible = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not visible) as bar:
        task = bar.add_task("runs", total=total, completed=done)

        def end(name: str, problem: str) -> None:
            del left[name]
            failed.extend([name] if problem else [])
            said = f"failed: {problem}" if problem else "done"
            if problem or not visible:
                text = f"[{total - len(left)}/{total}] {name}: {said}"
                console.print(text, markup=False, highlight=False)
            bar.advance(task)

        yield end


class _State(ProgressColumn):
    """A column: how many runs are running, by their logs having been touched, and have failed."""

    def __init__(self, left: dict[str, Job], failed: list[str]):
        super().__init__()
        self._left, self._failed = left, failed
        self._since = time.time() - 1  # s: clocks of file systems are coarse

    def render(self, task: Task) -> Text:
        logs = [job.log for job in list(self._left.values())]
        running = sum(log.exists() and log.stat().st_mtime >= self._since for log in logs)
        return Text(f"done, {running} running, {len(self._failed)} failed")
