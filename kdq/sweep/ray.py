"""Runs of a sweep as tasks of Ray: of a cluster that is there, or of one started here."""

import contextlib
import itertools
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from kdq.fields import ConfigError
from kdq.sweep.job import Executor, Job, execute, problem

RETRIES = 3  # of a run whose worker or process was lost
# For a cluster of our own; Ray's own niceness of 15 slows runs down.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
CHANGED = (*SETTINGS, "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")  # here, or by Ray


class LostError(RuntimeError):
    """A run was killed, by an operating system short of memory for one; Ray starts it again."""


def make(*, workers: int | None = None, address: str | None = None) -> Executor:
    """The cluster at `address`, or one on this machine with at most `workers` runs at a time (1).

    Raises ConfigError for both.
    """
    if address and workers is not None:
        raise ConfigError(
            f"--workers={workers} with --address={address}: the cluster decides how many runs it "
            "runs at once, by config.resources"
        )

    def run(jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        # Of this process and not of Ray's workers, which have OMP_NUM_THREADS=1 for one.
        environment = dict(os.environ)
        with _there(address) if address else _started(workers or 1, jobs):
            pending = {
                _task.options(**_options(job, is_local=not address)).remote(job, environment): job
                for job in jobs
            }
            try:
                while pending:
                    (end,), _ = ray.wait(list(pending))
                    yield pending.pop(end), _outcome(end)
            finally:
                for end in pending:
                    ray.cancel(end, force=True)

    return run


@ray.remote(max_retries=RETRIES, retry_exceptions=[LostError])
def _task(job: Job, environment: Mapping[str, str]) -> str:
    if job.resources.gpus:  # those that Ray chose
        chosen = "CUDA_VISIBLE_DEVICES"
        environment = {**environment, chosen: os.environ.get(chosen, "")}
    status = execute(job, environment=environment)
    if status < 0:
        raise LostError(problem(status))
    return problem(status)


def _options(job: Job, *, is_local: bool) -> dict[str, Any]:
    """Returns the resources that a run takes; unstated cores are one of a foreign cluster's."""
    resources = job.resources
    return {
        "name": job.name,
        "num_cpus": resources.cpus or (0 if is_local else 1),
        "num_gpus": resources.gpus,
        **({"memory": int(resources.memory_gib * 2**30)} if resources.memory_gib else {}),
        **({"resources": {"run": 1}} if is_local else {}),
    }


def _outcome(end: ray.ObjectRef) -> str:
    try:
        return ray.get(end)
    except ray.exceptions.RayTaskError as error:
        return f"{error.cause} (after {RETRIES} retries)"
    except ray.exceptions.RayError as error:
        return " ".join(str(error).split("\n")[0].split()) + f" (after {RETRIES} retries)"


@contextlib.contextmanager
def _there(address: str) -> Iterator[None]:
    host, _, port = address.partition(":")
    try:
        if port.isdigit():  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        _connect(address=address)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--address={address}: no Ray cluster answers there: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _started(workers: int, jobs: Sequence[Job]) -> Iterator[None]:
    """A cluster on this machine; nothing of it is left behind."""
    before = {name: os.environ[name] for name in CHANGED if name in os.environ}
    # Without a token in the environment Ray writes one to the home folder.
    os.environ.update(SETTINGS, RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        # Its sockets lie there, whose paths have at most 107 characters.
        with tempfile.TemporaryDirectory(prefix="kdq-ray-", ignore_cleanup_errors=True) as folder:
            try:
                _connect(
                    address="local",
                    resources={"run": workers},
                    include_dashboard=False,
                    object_store_memory=100 * 2**20,  # bytes; runs leave their results in files
                    _temp_dir=folder,
                )
                has = ray.cluster_resources()
                there = {
                    "cpus": has.get("CPU", 0),
                    "gpus": has.get("GPU", 0),
                    "memory_gib": has["memory"] / 2**30,
                }
                for job, key in itertools.product(jobs, there):
                    amount = getattr(job.resources, key)
                    if amount > there[key]:  # it would wait forever
                        raise ConfigError(
                            f"run {job.name}: config.resources.{key}={amount}: this machine has "
                            f"{there[key]:g}"
                        )
                yield
            finally:
                ray.shutdown()
    finally:
        for name in CHANGED:
            os.environ.pop(name, None)
        os.environ.update(before)


def _connect(**options: Any) -> None:
    """Ray's own start, which would take SIGTERM from whoever handles it."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level="ERROR", **options)
    signal.signal(signal.SIGTERM, handler)
