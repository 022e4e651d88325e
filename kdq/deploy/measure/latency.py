"""Latency: how long a model takes in each runtime, all of them taking turns in one process."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdq import provenance
from kdq.quantize.inputs import Batch

Call = Callable[[], Any]  # does its work once, to the end


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of a call, and how it compares with the base's."""

    milliseconds: float  # median of a call
    ratio: float  # median over the rounds of the base's time over its time: how many times faster
    quartiles: tuple[float, float]  # of that ratio


def take_turns(
    calls: Mapping[str, Call],
    base: str,
    *,
    rounds: int = 30,
    warmup: int = 3,
    least_seconds: float = 0.01,
) -> dict[str, Timing]:
    """Times calls, one after the other in each round: what slows a round slows all of them.

    Args:
      calls: by name.
      base: that the others are compared with, round by round.
      rounds: that count.
      warmup: rounds before them.
      least_seconds: a call that takes less is repeated within its turn.
    """
    times = seconds(calls, rounds=rounds, warmup=warmup, least_seconds=least_seconds)
    timings = {}
    for name, taken in times.items():
        low, mid, high = map(float, np.percentile(times[base] / taken, (25, 50, 75)))
        timings[name] = Timing(1e3 * float(np.median(taken)), mid, (low, high))
    return timings


def seconds(
    calls: Mapping[str, Call], *, rounds: int, warmup: int, least_seconds: float
) -> dict[str, np.ndarray]:
    """Returns the seconds of each call in each round that counts; arguments of `take_turns`."""
    repeats = {name: _repeats(call, least_seconds) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + warmup):
        # Another order each round, so that nobody always follows the same neighbour.
        for name in np.random.default_rng(round_).permutation(list(calls)):
            call, count = calls[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter() - start) / count)
    return {name: np.array(taken[warmup:]) for name, taken in times.items()}


def _repeats(call: Call, least_seconds: float) -> int:
    """Returns how often a call fits into the time, after the first, which may compile."""
    if not least_seconds:
        return 1
    call()
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    return max(1, int(np.ceil(least_seconds / max(taken, 1e-7))))


def measure(
    runtimes: Mapping[str, Callable[[Any], Any]],
    inputs: Batch,
    *,
    base: str,
    batches: Sequence[int] = (1, 64),
    **turns: Any,
) -> dict[str, dict[int, Timing]]:
    """Times runtimes on batches: `{name: {batch size: timing}}`.

    Args:
      runtimes: functions of a batch that return when its outputs are there.
      inputs: examples as the models take them, arrays with a leading axis of examples; repeated
        for a larger batch.
      base: one of the runtimes.
      batches: sizes.
      **turns: of `take_turns`.
    """
    timings: dict[str, dict[int, Timing]] = {name: {} for name in runtimes}
    for size in batches:
        resize = lambda a, size=size: np.ascontiguousarray(np.resize(a, (size, *a.shape[1:])))
        batch = jax.tree.map(resize, inputs)
        calls = {name: lambda run=run, batch=batch: run(batch) for name, run in runtimes.items()}
        for name, timing in take_turns(calls, base, **turns).items():
            timings[name][size] = timing
    return timings


def cores(threads: int | None) -> list[int]:
    """Returns the first cores that this process may use, as many as threads; None is all.

    Raises ValueError if there are not as many.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= len(allowed):
        raise ValueError(f"threads={threads}: this process has {len(allowed)} cores")
    return allowed[:threads]


@contextlib.contextmanager
def pinned(cores: Collection[int]) -> Iterator[None]:
    """Keeps this thread, and those that it starts meanwhile, to these cores.

    JAX has started its own by then, and uses every core.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def conditions(cores: Sequence[int]) -> dict[str, Any]:
    """Returns the conditions of latencies that are measured now, for their record."""
    return {"device": provenance.device(), "cores": list(cores), "load": os.getloadavg()[0]}
