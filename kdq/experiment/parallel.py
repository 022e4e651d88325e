"""Arms and seeds in several processes, each with its own cores of this machine.

A small network's step hardly gains by a second core; two steps at once do. Every process runs arms
as a single one does (`kdq.experiment.runner`), in the same workdir.
"""

import contextlib
import functools
import graphlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import numpy as np
from absl import logging

from kdq import child, heap, interrupts
from kdq import config as kdq_config
from kdq.config import ConfigError, Experiment
from kdq.deploy.measure import latency
from kdq.experiment import plan
from kdq.experiment.progress import Progress, Unit
from kdq.record import ArmRecord

Run = Callable[[str, int], ArmRecord]

# Of JAX's settings, those that a launcher may have changed.
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)
EVERY = 0.2  # seconds between two looks at what processes tell


def workers(experiment: Experiment) -> int:
    """Returns how many processes the arms of an experiment run in.

    `config.workers`, or by itself one for each seed as far as there are cores, where that pays: on
    a CPU, and without searches, which may time what they find.

    Raises ConfigError for several with a mesh or `seeds_at_once`, which share the cores otherwise,
    or with latencies, which are measured on a machine that does nothing else; and for more than
    there are cores.
    """
    timed = bool(experiment.export.latency_batches)
    alone = timed or experiment.seeds_at_once > 1 or jax.process_count() > 1
    alone = alone or _is_meshed(experiment)
    if experiment.workers > 1 and alone:
        raise ConfigError(
            f"config.workers={experiment.workers}: expected at most 1 with a mesh, several hosts, "
            "seeds_at_once or export.latency_batches"
        )
    cores = len(latency.cores(None))
    if experiment.workers > cores:
        raise ConfigError(
            f"config.workers={experiment.workers}: this process has {cores} cores, of which each "
            f"worker gets its own; expected at most {cores}, or 0 (by itself)"
        )
    if experiment.workers:
        return experiment.workers
    if alone or experiment.searches or jax.default_backend() != "cpu":
        return 1
    return min(len(experiment.seeds), cores)


def _is_meshed(experiment: Experiment) -> bool:
    mesh = experiment.mesh
    return {mesh.data, mesh.fsdp, mesh.tensor} != {1}


def needs(experiment: Experiment, order: Sequence[str], seed: int) -> dict[Unit, list[Unit]]:
    """Returns {arm and seed: those that have to be there before}, of the arms in `order`.

    Beside what an arm is made of that is the teacher, which it is compared with; and of arms whose
    bits one search finds each waits for the one before, which searches for it.
    """
    before = kdq_config.ancestors(experiment, experiment.teacher)
    needed, searched = {}, {}
    for name in order:
        others = list(kdq_config.parents(experiment, name))
        if name not in before:
            others.append(experiment.teacher)
        bits = experiment.arms[name].bits
        if bits in experiment.searches:
            # Uniform bits first: what is found is compared with them.
            first = (bits, plan.baseline_of(experiment, bits))
            others += [searched[search] for search in first if search in searched]
            searched[bits] = name
        needed[name, seed] = [(other, seed) for other in others]
    return needed


def run(
    experiment: Experiment,
    order: Sequence[str],
    missing: Collection[Unit],
    count: int,
    *,
    make: Callable[[Progress], Run],
    progress: Progress,
) -> None:
    """Runs arms and seeds that are not finished, each after those that it needs.

    A process goes on with the seed that it has, whose teacher it knows.

    Args:
      experiment: of the arms.
      order: of the arms, each after those it needs.
      missing: arms and seeds that are not finished.
      count: of processes.
      make: called once in each of them; what it returns runs an arm and seed. It is pickled.
      progress: told what happens, `progress.beside(i)` by the i-th process.

    Raises:
      Exception: whatever one of them raised; the others are ended.
    """
    units = {}
    for seed in experiment.seeds:
        for unit, others in needs(experiment, order, seed).items():
            if unit in missing:
                units[unit] = [other for other in others if other in missing]
    sorter = graphlib.TopologicalSorter(units)
    sorter.prepare()
    places = {unit: i for i, unit in enumerate(units)}
    ready: list[Unit] = []
    with _processes(min(count, len(units)), count, make) as (pools, queue):
        last: dict[int, int] = {}  # the seed of each process
        under_way: dict[futures.Future[ArmRecord], tuple[int, Unit]] = {}
        while sorter.is_active():
            ready += sorter.get_ready()
            for i in set(range(len(pools))) - {i for i, _ in under_way.values()}:
                if ready:
                    unit = min(ready, key=lambda unit: _rank(unit, i, last, places))
                    ready.remove(unit)
                    last[i] = unit[1]
                    under_way[pools[i].submit(_run, *unit)] = i, unit
            ended, _ = futures.wait(under_way, EVERY, futures.FIRST_COMPLETED)
            _forward(queue, progress)
            for future in ended:
                _, unit = under_way.pop(future)
                progress.done(future.result())
                sorter.done(unit)


def _rank(unit: Unit, process: int, last: Mapping[int, int], places: Mapping[Unit, int]) -> Any:
    """Returns what sorts its own seed first, then one that no other process has begun."""
    seed = unit[1]
    others = {other for i, other in last.items() if i != process}
    return seed != last.get(process), seed in others, places[unit]


@contextlib.contextmanager
def _processes(
    count: int, shares: int, make: Callable[[Progress], Run]
) -> Iterator[tuple[list[futures.ProcessPoolExecutor], Any]]:
    """Yields so many pools of one process each, which end with this one, and their queue.

    Args:
      count: of processes.
      shares: that the cores are cut into; the same for fewer processes, so that a run that goes on
        computes with as many threads.
      make: see `run`.
    """
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    queue = context.SimpleQueue()
    settings = {name: getattr(jax.config, name) for name in SETTINGS}
    cores = [share.tolist() for share in np.array_split(latency.cores(None), shares)]
    pools = [
        futures.ProcessPoolExecutor(
            1,
            mp_context=context,
            initializer=_start_worker,
            initargs=(os.getpid(), i, cores[i], settings, queue, make),
        )
        for i in range(count)
    ]
    try:
        yield pools, queue
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process of this run was killed, or could not begin (its own output says why); the "
            "same command again goes on from here"
        ) from error
    finally:
        # Not asked to end: an arm that is killed at any time resumes.
        with interrupts.held_back():  # or processes would be left, and waited for
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            for pool in pools:
                pool.shutdown(cancel_futures=True)


def _forward(queue: Any, progress: Progress) -> None:
    """Tells `progress` what the processes have sent."""
    while not queue.empty():
        process, event, arguments = queue.get()
        getattr(progress.beside(process), event)(*arguments)


# In the processes.

_run_here: Run | None = None


def _start_worker(
    parent: int,
    process: int,
    cores: Sequence[int],
    settings: Mapping[str, Any],
    queue: Any,
    make: Callable[[Progress], Run],
) -> None:
    global _run_here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    child.die_with_parent()
    if os.getppid() != parent:  # it has died already
        os._exit(1)
    os.sched_setaffinity(0, cores)  # before JAX counts them
    logging.set_verbosity(logging.WARNING)
    heap.keep_freed_memory()
    for name, value in settings.items():
        jax.config.update(name, value)
    _run_here = make(_QueueProgress(process, queue))


def _run(name: str, seed: int) -> ArmRecord:
    assert _run_here is not None
    return _run_here(name, seed)


class _QueueProgress(Progress):
    """Sends what happens to another process, of steps and parts of stages only now and then."""

    def __init__(self, process: int, queue: Any):
        self._process, self._queue, self._sent = process, queue, 0.0

    def _send(self, event: str, *arguments: Any) -> None:
        is_frequent = event == "step" or (event == "stage" and arguments[1] > 0)
        if is_frequent and time.monotonic() - self._sent <= EVERY:
            return
        if is_frequent:
            self._sent = time.monotonic()
        self._queue.put((self._process, event, arguments))

    prepare = functools.partialmethod(_send, "prepare")
    arm = functools.partialmethod(_send, "arm")
    step = functools.partialmethod(_send, "step")
    stage = functools.partialmethod(_send, "stage")
    search = functools.partialmethod(_send, "search")
    evaluated = functools.partialmethod(_send, "evaluated")
