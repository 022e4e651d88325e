"""Runs a sweep by an executor, and tells what failed."""

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdq import lock
from kdq.sweep import progress, results
from kdq.sweep.job import Executor
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
        progress.reporter(jobs, len(runs) - len(jobs)) as ended,
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
        print(_tail(log), file=sys.stderr)
    return not failed


def _tail(log: Path) -> str:
    if not log.is_file():
        return "(no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])


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
