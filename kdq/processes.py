"""Several processes that run one program on one mesh: who does what is done once.

With a single process nothing here does anything.
"""

import itertools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from kdq import messages

T = TypeVar("T")

HEARTBEAT_SECONDS = 20  # after so long without a sign of life a process counts as lost
_LONG_MS = 7 * 24 * 3600 * 1000  # heartbeats tell sooner who is gone
_ROUNDS = itertools.count()
LOST = "a process of this run was lost or failed; start all of them again, and the run goes on"


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of this run; to be called before JAX computes anything.

    The coordinator is process 0, at "HOST:PORT". None is as Slurm, Kubernetes, Open MPI or a TPU
    pod says. Raises ValueError if something is missing that the environment does not say.
    """
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def is_first() -> bool:
    """Returns whether this process writes what is written once: records, tables, files."""
    return jax.process_index() == 0


def first(fn: Callable[[], T]) -> T:
    """Returns in all processes what `fn` returns in the first one, or raises what it raises there.

    Only the first process calls it; `fn` computes on that process alone, so it must not use arrays
    of the whole mesh. What it returns or raises goes through `kdq.messages`.
    """
    if jax.process_count() == 1:
        return fn()
    data = b""
    if is_first():
        try:
            result = fn()
            data = messages.encode((result, None))
        except Exception as error:  # the others wait to hear of it
            _from_first(messages.encode((None, error)))
            raise
    data = _from_first(data)
    if is_first():
        return result
    result, error = messages.decode(data)
    if error is not None:
        raise error
    return result


def in_turn(fn: Callable[[], T]) -> T:
    """Returns what `fn` returns here. The first process calls it before the others do, which may
    then read what it wrote; if it raises there, it raises in all."""
    if jax.process_count() == 1:
        return fn()
    results: list[T] = []
    first(lambda: results.append(fn()))
    return results[0] if results else fn()


def agree(value: bool) -> bool:
    """Returns what the first process says."""
    return value if jax.process_count() == 1 else _from_first(bytes([value])) == b"\1"


def any_of(value: bool) -> bool:
    """Returns whether it is true in any of the processes, all of which have to ask."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


def _from_first(data: bytes) -> bytes:
    """Returns the bytes of the first process.

    The others wait for it at a barrier of the coordinator's: a collective of the devices gives up
    after half a minute of waiting, and so comes when all are there.
    """
    multihost.get_barrier_sync_fn()(key=f"kdq/{next(_ROUNDS)}", timeout_ms=_LONG_MS)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # Few different sizes, each of which is a program.
    padded = np.zeros(max(64, 1 << (size - 1).bit_length()), np.uint8)
    if is_first():
        padded[:size] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes()


def leave_if_lost(error: BaseException) -> None:
    """Ends this process if JAX lost another one."""
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        leave(error)


def leave(error: BaseException) -> NoReturn:
    """Ends a process whose peers may be gone: JAX's own way out would wait for them."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    print(f"error: {LOST} ({reason})", file=sys.stderr, flush=True)
    os._exit(1)
