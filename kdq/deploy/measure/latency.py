"""Latency: how long a model takes in each runtime, all of them taking turns in one process."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdq import provenance

Call = Callable[[], Any]  # does its work once, to the end


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one of those that took turns."""

    milliseconds: float  # median of a call
    ratio: float  # median over the rounds of the base's time over its own: how many times faster
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
    measured = seconds(calls, rounds=rounds, warmup=warmup, least_seconds=least_seconds)
    found = {}
    for name, own in measured.items():
        low, mid, high = np.percentile(measured[base] / own, (25, 50, 75))
        found[name] = Timing(1e3 * float(np.median(own)), float(mid), (float(low), float(high)))
    return found


def seconds(
    calls: Mapping[str, Call], *, rounds: int, warmup: int, least_seconds: float
) -> dict[str, np.ndarray]:
    """The seconds of each call in each round that counts; arguments of `take_turns`."""
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
    return {name: np.array(own[warmup:]) for name, own in times.items()}


def _repeats(call: Call, least_seconds: float) -> int:
    """How often a call fits into the time, after the first, which may compile."""
    if not least_seconds:
        return 1
    call()
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    return max(1, int(np.ceil(least_seconds / max(taken, 1e-7))))


def measure(
    runtimes: Mapping[str, Callable[[Any], Any]],
    images: Any,
    *,
    base: str,
    batches: Sequence[int] = (1, 64),
    **turns: Any,
) -> dict[str, dict[int, Timing]]:
    """Times runtimes on batches of images: `{name: {batch size: timing}}`.

    Args:
      runtimes: functions of a batch that return when its outputs are there.
      images: [examples, ...] as the models take them, or a tuple of arrays; repeated for a larger
        batch.
      base: one of the runtimes.
      batches: sizes.
      **turns: of `take_turns`.
    """
    found: dict[str, dict[int, Timing]] = {name: {} for name in runtimes}
    for size in batches:
        batch = jax.tree.map(functools.partial(_resized, size=size), images)
        calls = {name: lambda run=run, batch=batch: run(batch) for name, run in runtimes.items()}
        for name, timing in take_turns(calls, base, **turns).items():
            found[name][size] = timing
    return found


def _resized(array: np.ndarray, size: int) -> np.ndarray:
    """As many examples, repeated if there are fewer."""
    return np.ascontiguousarray(np.resize(array, (size, *array.shape[1:])))


def cores(threads: int | None) -> list[int]:
    """The first cores that this process may use, as many as threads; None is all.

    Raises:
      ValueError: there are not as many.
    """
    found = sorted(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= len(found):
        raise ValueError(f"threads={threads}: this process has {len(found)} cores")
    return found[:threads]


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
    """What latencies were measured under, for their record."""
    return {"device": provenance.device(), "cores": list(cores), "load": os.getloadavg()[0]}
