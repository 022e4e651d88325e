"""Runs the arms of an experiment that its workdir does not have."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax

from kdq import config as kdq_config
from kdq import lock, processes
from kdq.config import ConfigError, Experiment
from kdq.experiment import arm, check, exports, parallel, sharing
from kdq.experiment.arm import ArmRun
from kdq.experiment.context import Context
from kdq.experiment.progress import Progress, Unit
from kdq.fields import expand_user
from kdq.record import ArmRecord
from kdq.train import metrics_writer


def run(
    experiment: Experiment,
    workdir: str | Path,
    *,
    arms: Sequence[str] | None = None,
    progress: Progress | None = None,
    tensorboard: bool = False,
    in_processes: bool = False,
    shared: str | Path | None = None,
) -> list[ArmRecord]:
    """Runs every arm and seed that `workdir` does not have yet; returns all their records.

    Args:
      experiment: from `kdq.config.freeze`.
      workdir: made if need be. A run that was killed goes on where it was.
      arms: only these and what they need; None is all.
      progress: told what happens.
      tensorboard: whether arms write their training curves as TensorBoard's events, too.
      in_processes: whether `config.workers` counts; the main module is imported in each of them, so
        a script must do nothing but under `if __name__ == "__main__"`.
      shared: folder by which runs share the arms that are the same in several of them: trained by
        one, copied by the others (see `kdq.experiment.sharing`).

    Raises:
      ConfigError: something that the config names does not exist, `workdir` holds an arm that was
        run with another config, or another program writes there. Nothing has been trained then.
      ExportError: files that could not be made, at the end; all else is in the workdir.
    """
    if tensorboard:
        metrics_writer.tensorboard()  # or say now that it is not installed
    workdir = Path(expand_user(workdir, "workdir"))
    context = Context(experiment, workdir, progress, tensorboard=tensorboard)
    workers = parallel.workers(experiment)
    with lock.hold(workdir):
        return _run(context, arms, workers if in_processes else 1, shared)


def _run(
    context: Context, arms: Sequence[str] | None, workers: int, shared: str | Path | None
) -> list[ArmRecord]:
    """Returns the records of these arms, run here or by so many processes."""
    experiment = context.experiment
    names = list(experiment.arms) if arms is None else list(arms)
    for name in names:
        if name not in experiment.arms:
            raise ConfigError(kdq_config.unknown("arm", name, experiment.arms))
    order = kdq_config.ancestors(experiment, experiment.teacher, *names)
    records = _finished(context, order)
    if None in records.values():
        check.check(context, order)
    exports.check_config(experiment.export)
    processes.first(context.store.save_config)
    context.progress.start(
        {
            (name, seed): None if record else context.inputs.last_step(experiment.arms[name])
            for (name, seed), record in records.items()
        }
    )
    missing = [unit for unit, record in records.items() if record is None]
    elsewhere = set(missing) if workers > 1 else set()
    if elsewhere:
        make = functools.partial(
            make_runner,
            experiment,
            context.store.workdir,
            tensorboard=context.tensorboard,
            shared=shared,
        )
        parallel.run(experiment, order, elsewhere, workers, make=make, progress=context.progress)
        records = _finished(context, order)
    seeds, count = experiment.seeds, experiment.seeds_at_once
    for group in (seeds[i : i + count] for i in range(0, len(seeds), count)):
        for name in order:
            left = [seed for seed in group if records[name, seed] is None]
            records |= {(name, r.seed): r for r in _run_arm(context, name, left, shared)}
            for seed in group:
                if (name, seed) not in elsewhere:
                    records[name, seed] = _finish(context, records[name, seed])
    shown = [name for name in experiment.arms if name in order]
    made = [records[name, seed] for name in shown for seed in experiment.seeds]
    exports.raise_failures(
        {
            f"{record.arm}, seed {record.seed}, {form}": why
            for record in made
            for form, why in record.failed_exports.items()
            if form in experiment.export.formats
        }
    )
    return made


def make_runner(
    experiment: Experiment,
    workdir: Path,
    progress: Progress,
    *,
    tensorboard: bool,
    shared: str | Path | None,
) -> parallel.Run:
    """Returns a function that runs an arm and seed, of which all that it needs is there."""
    context = Context(experiment, workdir, progress, tensorboard=tensorboard)
    return lambda name, seed: _finish(context, _run_arm(context, name, [seed], shared)[0])


def _finished(context: Context, order: Sequence[str]) -> dict[Unit, ArmRecord | None]:
    units = [(name, seed) for seed in context.experiment.seeds for name in order]
    return processes.first(lambda: {unit: context.store.finished(*unit) for unit in units})


def _finish(context: Context, record: ArmRecord) -> ArmRecord:
    """Exports an arm that has been run, or had been before."""
    if record.status == "ok":
        record = processes.first(lambda: arm.export(context, record))
    context.progress.done(record)
    return record


def _run_arm(
    context: Context, name: str, seeds: Sequence[int], shared: str | Path | None
) -> list[ArmRecord]:
    """Returns the records of an arm, of which so many seeds go together."""
    if shared and jax.process_count() == 1:
        runs = sharing.Shared(shared, context.experiment, context.store)
        if runs.covers(name):
            train = lambda seed: lambda: _run_here(context, name, [seed])[0]
            return [runs.once(context.identify(name, seed), train(seed)) for seed in seeds]
    return _run_here(context, name, seeds)


def _run_here(context: Context, name: str, seeds: Sequence[int]) -> list[ArmRecord]:
    """Returns the records of seeds that are copied from an arm of equal bits, or trained."""
    copy = lambda seed: sharing.copy_equal_bits(context, context.identify(name, seed))
    records = {seed: processes.first(functools.partial(copy, seed)) for seed in seeds}
    runs = [ArmRun(context, name, seed) for seed in seeds if records[seed] is None]
    for started in runs:
        started.prepare()
    trained = [started for started in runs if started.weights]
    fits = dict(zip(trained, arm.train(trained), strict=True))
    for started in runs:
        if started in fits:
            started.conclude(fits[started])
        started.save()
        records[started.seed] = started.record
    return [records[seed] for seed in seeds]
