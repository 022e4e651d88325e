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
from jax._src import distributed  # as Orbax does: there is no public way to the store
from jax.experimental import multihost_utils

from kdq import messages

T = TypeVar("T")

HEARTBEAT_SECONDS = 20  # after so long without a sign of life a process counts as lost
_LONG_MS = 7 * 24 * 3600 * 1000  # heartbeats tell sooner who is gone
_PART_BYTES = 1 << 20  # gRPC refuses messages of some megabytes
_ROUNDS = itertools.count()
LOST = "a process of this run was lost or failed; start all of them again, and the run goes on"


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of this run; to be called before JAX computes anything.

    Args:
      coordinator_address: "HOST:PORT" of process 0. None, here and below: as Slurm, Kubernetes,
        Open MPI or a TPU pod says.
      num_processes: of all.
      process_id: of this one, from 0.

    Raises:
      ValueError: something is missing that the environment does not say.
    """
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def is_first() -> bool:
    """Whether this process writes what is written once: records, tables, metrics, packed files."""
    return jax.process_index() == 0


def first(fn: Callable[[], T]) -> T:
    """What `fn` returns in the first process, for all; or what it raises, in all.

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
    """What `fn` returns here. The first process calls it before the others do, which may then read
    what it wrote; if it raises there, it raises in all."""
    if jax.process_count() == 1:
        return fn()
    own: list[T] = []
    first(lambda: own.append(fn()))
    return own[0] if own else fn()


def agree(value: bool) -> bool:
    """What the first process says."""
    return value if jax.process_count() == 1 else _from_first(bytes([value])) == b"\1"


def any_of(value: bool) -> bool:
    """Returns whether it is true in any of the processes, all of which have to ask."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


def _from_first(data: bytes) -> bytes:
    """Returns the bytes of the first process.

    By the coordinator's store: a collective of the devices would give up after half a minute of
    waiting for the first process, and is no way for what it raises.
    """
    client, name = distributed.global_state.client, f"kdq/{next(_ROUNDS)}"
    if is_first():
        parts = [data[i : i + _PART_BYTES] for i in range(0, len(data), _PART_BYTES)]
        for i, part in enumerate(parts):
            client.key_value_set_bytes(f"{name}/{i}", part)
        client.key_value_set(f"{name}/count", str(len(parts)))
    else:
        count = int(client.blocking_key_value_get(f"{name}/count", _LONG_MS))
        parts = [client.blocking_key_value_get_bytes(f"{name}/{i}", _LONG_MS) for i in range(count)]
        data = b"".join(parts)
    client.wait_at_barrier(name, _LONG_MS)
    if is_first():
        client.key_value_delete(name)
    return data


def leave_if_lost(error: BaseException) -> None:
    """Ends this process if JAX lost another one: JAX's own way out would wait for it."""
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        leave(error)


def leave(error: BaseException) -> NoReturn:
    """Ends a process whose peers may be gone: JAX's own way out would wait for them."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    print(f"error: {LOST} ({reason})", file=sys.stderr, flush=True)
    os._exit(1)
