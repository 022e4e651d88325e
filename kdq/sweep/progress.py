"""How far a sweep is: a bar on a terminal, a line a run elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def reporter(total: int, done: int, console: Console | None = None) -> Iterator[Callable]:
    """Gives a function to call with the name of a run that ended and its problem ("" for none).

    Args:
      total: runs of the sweep.
      done: of these, those that were finished before.
      console: None is the standard error.
    """
    console = console or Console(file=sys.stderr, soft_wrap=True)
    ended, failed = done, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("runs", total=total, completed=done)

        def end(name: str, problem: str) -> None:
            nonlocal ended, failed
            ended, failed = ended + 1, failed + bool(problem)
            said = f"failed: {problem}" if problem else "done"
            if problem or not console.is_terminal:
                console.print(f"[{ended}/{total}] {name}: {said}", markup=False, highlight=False)
            bar.update(task, completed=ended, description=f"runs, {failed} failed")

        yield end
