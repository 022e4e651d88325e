"""Runs of a sweep as processes of this machine."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from kdq import pool
from kdq.sweep.job import Executor, Job, execute, problem


def make(*, workers: int | None = None) -> Executor:
    """At most `workers` runs at a time (1 if not given); each may use every core."""

    def run(jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        ends = pool.run(dict.fromkeys(jobs, ()), _start, count=workers or 1)
        with contextlib.closing(ends):
            for job, status in ends:
                yield job, problem(status)

    return run


def _start(_: pool.Send) -> Callable[[Job], int]:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # `execute` ends the job then
    return execute
