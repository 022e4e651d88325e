"""Progress of a sweep: a bar on a terminal, a line a run elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

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

from kdq.sweep.job import Job


@contextlib.contextmanager
def reporter(
    jobs: Sequence[Job], done: int, console: Console | None = None
) -> Iterator[Callable[[str, str], None]]:
    """Gives a function to call with the name of a job that ended and its problem ("" for none).

    Args:
      jobs: of the runs that were not finished before.
      done: how many were.
      console: None is the standard error.
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
