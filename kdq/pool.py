"""Processes of this machine that do one task after another: arms of a run, runs of a sweep.

They end with this process, however it ends, and with whatever goes wrong in one of them; nothing is
asked of them then, since an arm or a run that is killed at any time resumes.
"""

import contextlib
import graphlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any, TypeVar

from kdq import child, interrupts

T = TypeVar("T", bound=Hashable)
R = TypeVar("R")
Send = Callable[..., None]

PATIENCE = 10  # seconds in which a process ends that SIGTERM has told to


def run(
    tasks: Mapping[T, Collection[T]],
    start: Callable[[Send], Callable[[T], R]],
    *,
    count: int,
    cores: Sequence[Sequence[int]] = (),
    group: Callable[[T], Hashable] = lambda task: None,
    hear: Callable[..., None] = lambda worker, *message: None,
) -> Iterator[tuple[T, R]]:
    """Yields each task when it is done, with its result; closing the iterator ends all processes.

    A process goes on with tasks of the group that it has, then with a group that no other has.

    Args:
      tasks: each with those that have to be done before it; these are tasks too.
      start: called once in each process; what it returns does a task there. What it is given sends
        a message to `hear` here. It is pickled, and the main module is imported in each process.
      count: of processes, at most.
      cores: of each of them; () is all for all.
      group: of a task.
      hear: called with the number of a process and the arguments of its message.

    Raises:
      ChildProcessError: one of them was killed.
      Exception: whatever a task raised.
    """
    sorter = graphlib.TopologicalSorter(tasks)
    sorter.prepare()
    places = {task: i for i, task in enumerate(tasks)}
    ready: list[T] = []
    groups: dict[int, Hashable] = {}  # of each process, the last
    under_way: dict[int, T] = {}
    with _started(min(count, len(tasks)), start, cores) as pipes:
        while sorter.is_active():
            ready += sorter.get_ready()
            for i in range(len(pipes)):
                if not ready or i in under_way:
                    continue
                others = {g for other, g in groups.items() if other != i}
                ranks = {
                    task: (group(task) != groups.get(i), group(task) in others, places[task])
                    for task in ready
                }
                under_way[i] = task = min(ready, key=ranks.__getitem__)
                ready.remove(task)
                groups[i] = group(task)
                with _named_death():
                    pipes[i].send(task)
            for pipe in connection.wait(pipes):
                i = pipes.index(pipe)
                with _named_death():
                    kind, *content = pipe.recv()
                if kind == "message":
                    hear(i, *content)
                elif kind == "error":
                    error, trace = content
                    raise error from RuntimeError(f"in a process of this run:\n{trace}")
                else:
                    task = under_way.pop(i)
                    yield task, content[0]
                    sorter.done(task)


@contextlib.contextmanager
def _started(
    count: int, start: Callable[[Send], Callable[[T], R]], cores: Sequence[Sequence[int]]
) -> Iterator[list[connection.Connection]]:
    """Yields this end of a pipe to each of so many processes."""
    context, processes, pipes = multiprocessing.get_context("spawn"), [], []
    try:
        for i in range(count):
            here, there = context.Pipe()
            pipes.append(here)
            arguments = (there, os.getpid(), cores[i] if cores else (), start)
            processes.append(context.Process(target=_work, args=arguments))
            processes[-1].start()
            there.close()  # so that the pipe ends with the process
        yield pipes
    finally:
        with interrupts.held_back():  # or processes would be left
            begun = [process for process in processes if process.pid]
            for process in begun:
                process.terminate()
            for process in begun:
                process.join(PATIENCE)
                process.kill()
                process.join()


@contextlib.contextmanager
def _named_death() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:  # its pipe ended, perhaps within a message
        raise ChildProcessError(
            "a process of this run was killed, or could not begin (its own output says why); the "
            "same command again goes on from here"
        ) from error


def _work(
    pipe: connection.Connection,
    parent: int,
    cores: Sequence[int],
    start: Callable[[Send], Callable[[Any], Any]],
) -> None:
    """Does tasks, in a process of the pool."""
    # The parent handles Ctrl-C. A handler, since SIG_IGN would be handed on to programs run here.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the parent may ignore
    child.die_with_parent()
    if os.getppid() != parent:  # it has died already
        os._exit(1)
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX counts them
    try:
        do = start(lambda *message: pipe.send(("message", *message)))
        while True:
            pipe.send(("result", do(pipe.recv())))
    except Exception as error:
        pipe.send(("error", error, traceback.format_exc()))
