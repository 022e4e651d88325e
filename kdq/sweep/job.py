"""One run as an executor sees it: a command, where its output goes, what it needs."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from kdq import child
from kdq.schema import Resources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command that ends at once if its work is done, and goes on where it was if it is not."""

    name: str
    command: tuple[str, ...]
    folder: Path  # where the command is started: paths of a config are relative to it
    log: Path  # its output and errors, of every attempt
    resources: Resources = dataclasses.field(default_factory=Resources)


class Executor(Protocol):
    """Runs jobs; closing the iterator stops those that run and drops those that wait."""

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        """Yields each job when it has ended, with what went wrong; "" is nothing."""
        ...


def execute(
    job: Job,
    *,
    environment: Mapping[str, str] | None = None,
    ignored: Sequence[int] = (),
) -> int:
    """Runs a job here, in a process group of its own, and returns its exit status.

    The group is killed if anything is raised here: a run that is killed at any time resumes, so
    there is nothing to ask it for. It does not see `ignored` signals.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.log.touch()  # says that it has been started
    numbers = ",".join(str(int(number)) for number in ignored)
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", child.__file__, numbers, *job.command],
            cwd=job.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def problem(status: int) -> str:
    """Returns what went wrong by an exit status, "" for 0."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}" if status else ""
