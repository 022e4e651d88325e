"""Arms and seeds in several processes, each with its own cores of this machine.

A small network's step hardly gains by a second core; two steps at once do. Every process runs arms
as a single one does (`kdq.experiment.runner`), in the same workdir.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from kdq import config as kdq_config
from kdq import heap, pool
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
EVERY = 0.2  # seconds at least between two steps that a process tells


def workers(experiment: Experiment) -> int:
    """Returns how many processes the arms of an experiment run in.

    `config.workers`, or by itself one for each seed as far as there are cores, where that pays: on
    a CPU, and without searches, which may time what they find.

    Raises ConfigError for several with a mesh or `seeds_at_once`, which share the cores otherwise,
    or with latencies, which are measured on a machine that does nothing else; and for more than
    there are cores.
    """
    mesh, timed = experiment.mesh, bool(experiment.export.latency_batches)
    alone = timed or experiment.seeds_at_once > 1 or jax.process_count() > 1
    alone = alone or {mesh.data, mesh.fsdp, mesh.tensor} != {1}
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

    A process goes on with the seed that it has, whose teacher it knows. What one of them raises is
    raised here, and ends the others.

    Args:
      experiment: of the arms.
      order: of the arms, each after those it needs.
      missing: those that are not finished.
      count: of processes, and of the shares that the cores are cut into: the same when few arms are
        left, so that a run that goes on computes with as many threads.
      make: called once in each of them; what it returns runs an arm and seed. It is pickled.
      progress: told what happens, `progress.beside(i)` by the i-th process.
    """
    units = {}
    for seed in experiment.seeds:
        for unit, others in needs(experiment, order, seed).items():
            if unit in missing:
                units[unit] = [other for other in others if other in missing]
    settings = {name: getattr(jax.config, name) for name in SETTINGS}
    ends = pool.run(
        units,
        functools.partial(_start, settings, make),
        count=count,
        cores=[share.tolist() for share in np.array_split(latency.cores(None), count)],
        group=lambda unit: unit[1],
        hear=lambda i, event, *details: getattr(progress.beside(i), event)(*details),
    )
    with contextlib.closing(ends):
        for _, record in ends:
            progress.done(record)


def _start(
    settings: Mapping[str, Any], make: Callable[[Progress], Run], send: pool.Send
) -> Callable[[Unit], ArmRecord]:
    """Makes a process of the pool ready for arms."""
    logging.set_verbosity(logging.WARNING)
    heap.keep_freed_memory()
    for name, value in settings.items():
        jax.config.update(name, value)
    run_here = make(_SentProgress(send))
    return lambda unit: run_here(*unit)


class _SentProgress(Progress):
    """Sends what happens to the first process, of steps and parts of stages only now and then."""

    def __init__(self, send: pool.Send):
        self._send_message, self._sent = send, 0.0

    def _send(self, event: str, *arguments: Any) -> None:
        if event == "step" or (event == "stage" and arguments[1] > 0):
            if time.monotonic() - self._sent <= EVERY:
                return
            self._sent = time.monotonic()
        self._send_message(event, *arguments)

    prepare = functools.partialmethod(_send, "prepare")
    arm = functools.partialmethod(_send, "arm")
    step = functools.partialmethod(_send, "step")
    stage = functools.partialmethod(_send, "stage")
    search = functools.partialmethod(_send, "search")
    evaluated = functools.partialmethod(_send, "evaluated")
