"""Runs of a sweep as jobs of Slurm, by submitit."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import submitit

from kdq.fields import ConfigError, unknown
from kdq.schema import Resources
from kdq.sweep.job import Executor, Job, execute, problem

# submitit's own executors: "local" runs processes of this machine, all of them at once, and "debug"
# runs one after another in this one; they are for trying things out.
CLUSTERS = ("slurm", "local", "debug")
SECONDS = 10.0  # from one look at the jobs to the next


class Task(submitit.helpers.Checkpointable):
    """A job that is queued again as it is after a timeout or a preemption: the run resumes."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self) -> int:
        # Slurm's signals go to every process of a job, and are for submitit's alone.
        return execute(self.job, ignored=(signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2))


def make(
    *,
    folder: Path,
    workers: int | None = None,
    cluster: str = "slurm",
    parameters: Mapping[str, str | bool] | None = None,
) -> Executor:
    """Job arrays, one for all runs with the same resources.

    Args:
      folder: for submitit's files; on a disk that the nodes share.
      workers: at most so many runs of an array at a time; None is all.
      cluster: one of CLUSTERS. Raises ConfigError for others, or if there is no sbatch here.
      parameters: of sbatch, beside the resources: {"partition": "gpu", "exclusive": True}.
    """
    if cluster not in CLUSTERS:
        raise ConfigError(unknown("--cluster", cluster, CLUSTERS))
    try:
        submitit.AutoExecutor(folder, cluster=cluster)
    except RuntimeError as error:
        raise ConfigError(f"--executor=slurm: {error}") from error

    def run(jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        pending: dict[submitit.Job, Job] = {}
        groups: dict[Resources, list[Job]] = {}
        for job in jobs:
            groups.setdefault(job.resources, []).append(job)
            if not job.resources.minutes:
                raise ConfigError(
                    f"run {job.name}: config.resources.minutes=0 is unstated, and Slurm needs it"
                )
        try:
            for resources, same in groups.items():
                stated = {
                    "cpus_per_task": resources.cpus,
                    "gpus_per_node": resources.gpus,
                    "mem_gb": resources.memory_gib,
                    "timeout_min": resources.minutes,
                }
                engine = submitit.AutoExecutor(folder, cluster=cluster)
                engine.update_parameters(
                    name="kdq",
                    **{name: amount for name, amount in stated.items() if amount},
                    slurm_array_parallelism=workers or len(same),
                    slurm_additional_parameters=dict(parameters or {}),
                )
                submitted = engine.submit_array([Task(job) for job in same])
                pending |= dict(zip(submitted, same, strict=True))
            seconds = SECONDS if cluster == "slurm" else 0.2
            for end in submitit.helpers.as_completed(list(pending), poll_frequency=seconds):
                yield pending.pop(end), _outcome(end)
        finally:
            for end in pending:
                end.cancel(check=False)
            if cluster == "local":
                for end in pending:
                    end.wait()

    return run


def _outcome(end: submitit.Job) -> str:
    error = end.exception()
    if error is None:
        return problem(end.result())
    return " ".join(str(error).split("\n")[0].split())
