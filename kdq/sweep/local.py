"""Runs of a sweep as processes of this machine."""

import concurrent.futures
import threading
from collections.abc import Iterator, Sequence

from kdq.fields import ConfigError
from kdq.sweep.job import Executor, Job, execute, problem


def make(*, workers: int | None = None) -> Executor:
    """At most `workers` runs at a time (1 if not given); each may use every core."""
    workers = 1 if workers is None else workers
    if workers < 1:
        raise ConfigError(f"--workers={workers}: expected at least 1")

    def run(jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            ends = {pool.submit(execute, job, stop=stop): job for job in jobs}
            try:
                for end in concurrent.futures.as_completed(ends):
                    yield ends[end], problem(end.result())
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    return run
