"""Runs arms: each starts, is calibrated, trained, packed and measured the same way."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from kdq import config as kdq_config
from kdq import lock, models, processes, provenance, quantize
from kdq.config import Arm, ConfigError, Experiment
from kdq.experiment import (
    check,
    exports,
    initial,
    measure,
    parallel,
    plan,
    sharing,
    training,
    transfer,
)
from kdq.experiment.found import Found
from kdq.experiment.inputs import Inputs
from kdq.experiment.progress import Progress
from kdq.experiment.quantized import OBSERVERS, quantized
from kdq.experiment.records import digests_of, file_digest
from kdq.experiment.searching import Searches
from kdq.experiment.store import PACKED, Store, load
from kdq.experiment.teaching import Teachers
from kdq.fields import expand_user
from kdq.quantize.network import Weights
from kdq.record import ArmRecord
from kdq.search.problem import InfeasibleError
from kdq.train import loop, metrics_writer, optimizer, sharding, together
from kdq.train.diagnose import NonFiniteError
from kdq.train.loop import Fit, Selection
from kdq.train.state import TrainState
from kdq.train.training import Training
from kdq.types import Array, Batch

log = logging.getLogger(__name__)


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
    runner = _Runner(experiment, workdir, progress or Progress(), tensorboard, shared)
    workers = parallel.workers(experiment)
    with lock.hold(workdir):
        return runner.run(arms, workers if in_processes else 1)


def _runs_units(
    experiment: Experiment,
    workdir: Path,
    progress: Progress,
    *,
    tensorboard: bool,
    shared: str | Path | None,
) -> parallel.Run:
    return _Runner(experiment, workdir, progress, tensorboard, shared).unit


def task(
    experiment: Experiment, workdir: str | Path, name: str, seed: int
) -> tuple[Training, TrainState]:
    """What an arm's training would begin with, once what it needs has been run.

    Raises ConfigError for an arm that does not train.
    """
    runner = _Runner(experiment, Path(workdir), Progress())
    if not experiment.arms[name].epochs:
        raise ConfigError(f"config.arms.{name}.epochs=0: it is not trained")
    start, found, _ = runner._begin(name, seed)
    applied = found.applied(experiment, name) if found else experiment
    return runner._task(applied, name, seed, start)


class _Runner:
    """One experiment in one process: its data and models, and what arms share."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        progress: Progress,
        tensorboard: bool = False,
        shared: str | Path | None = None,
    ):
        self.experiment, self.progress, self.tensorboard = experiment, progress, tensorboard
        self.models = _build_models(experiment)
        self.store = Store(experiment, workdir)
        self.shared_folder = shared
        alone = jax.process_count() == 1
        self.shared = sharing.Shared(shared, experiment, self.store) if shared and alone else None
        for name, arm in experiment.arms.items():
            if arm.observer not in OBSERVERS:
                where = f"config.arms.{name}.observer:"
                raise ConfigError(kdq_config.unknown(where, arm.observer, OBSERVERS))
        self.optimizer = optimizer.make_optimizer(experiment.optimizer)
        self.layout = sharding.make_layout(experiment.mesh)
        if experiment.seeds_at_once > 1 and self.layout.mesh:
            raise ConfigError(
                f"config.seeds_at_once={experiment.seeds_at_once} with a mesh of "
                f"{self.layout.size} devices: expected a mesh of 1 with more than one seed at once"
            )
        self.inputs = Inputs(experiment)
        self.teachers = Teachers(experiment, self.models, self.store, self.inputs)
        self.searches = Searches(
            experiment, self.models, self.store, self.inputs, self.teachers, self.progress
        )
        # All arms of seeds that go together run before those of the next.
        self.comparison = functools.lru_cache(maxsize=experiment.seeds_at_once)(self._comparison)

    @functools.cached_property
    def validation(self) -> list[Batch]:
        """Where training is."""
        return self.inputs.validation_on(self.layout)

    def run(self, arms: Sequence[str] | None, workers: int = 1) -> list[ArmRecord]:
        """The records of these arms, run here or by so many processes."""
        experiment = self.experiment
        names = list(experiment.arms) if arms is None else list(arms)
        for name in names:
            if name not in experiment.arms:
                raise ConfigError(kdq_config.unknown("arm", name, experiment.arms))
        order = plan.in_order(experiment, [experiment.teacher, *names])
        records = self._finished(order)
        if None in records.values():
            check.check(experiment, self.models, self.inputs, self.teachers, self.layout)
            self.searches.check(order)
        exports.check_config(experiment.export)
        processes.first(self.store.save_config)
        self.progress.start(
            {
                (name, seed): None if record else self.inputs.last_step(experiment.arms[name])
                for (name, seed), record in records.items()
            }
        )
        elsewhere: set[parallel.Unit] = set()
        if workers > 1 and None in records.values():
            elsewhere = {unit for unit, record in records.items() if record is None}
            make = functools.partial(
                _runs_units, tensorboard=self.tensorboard, shared=self.shared_folder
            )
            where = (experiment, self.store.workdir, order, elsewhere, workers)
            parallel.run(*where, make=make, progress=self.progress)
            records = self._finished(order)
        seeds, count = experiment.seeds, experiment.seeds_at_once
        for group in (seeds[i : i + count] for i in range(0, len(seeds), count)):
            for name in order:
                missing = [seed for seed in group if records[name, seed] is None]
                for record in self._run_arm(name, missing):
                    records[name, record.seed] = record
                for seed in group:
                    if (name, seed) not in elsewhere:
                        records[name, seed] = self._finish(records[name, seed])
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

    def unit(self, name: str, seed: int) -> ArmRecord:
        """Runs an arm and seed, of which all that it needs is there."""
        (record,) = self._run_arm(name, [seed])
        return self._finish(record)

    def _finished(self, order: Sequence[str]) -> dict[parallel.Unit, ArmRecord | None]:
        seeds = self.experiment.seeds
        units = [(name, seed) for seed in seeds for name in order]
        return processes.first(lambda: {unit: self.store.finished(*unit) for unit in units})

    def _finish(self, record: ArmRecord) -> ArmRecord:
        if record.status == "ok":
            record = processes.first(lambda: self._export(record))
        self.progress.done(record)
        return record

    def _run_arm(self, name: str, seeds: Sequence[int]) -> list[ArmRecord]:
        """The records of an arm, of which so many seeds go together."""
        if not (self.shared and self.shared.covers(name)):
            return self._run_here(name, seeds)
        return [
            self.shared.once(
                self._identity(name, seed), lambda seed=seed: self._run_here(name, [seed])[0]
            )
            for seed in seeds
        ]

    def _run_here(self, name: str, seeds: Sequence[int]) -> list[ArmRecord]:
        equal = functools.partial(sharing.of_equal_bits, self.experiment, self.store, self.searches)
        records = {
            seed: processes.first(lambda seed=seed: equal(self._identity(name, seed)))
            for seed in seeds
        }
        trained = self._train_here(name, [seed for seed in seeds if records[seed] is None])
        records |= {record.seed: record for record in trained}
        return list(records.values())

    def _train_here(self, name: str, seeds: Sequence[int]) -> list[ArmRecord]:
        begun = [self._prepare(name, seed) for seed in seeds]
        fits = self._train(name, [one for one in begun if one.start])
        for one in begun:
            if one.start:
                self._conclude(name, one, fits[one.seed])
            processes.first(functools.partial(self.store.save, one.record))
        return [one.record for one in begun]

    # All processes train; what comes before and after, one does for all.

    def _prepare(self, name: str, seed: int) -> "_Begun":
        self.progress.prepare(name, seed)
        record = processes.first(lambda: self._identity(name, seed))
        begun = _Begun(seed=seed, record=record, experiment=self.experiment)
        with _failing(begun):
            begun.start, found, begun.told = processes.first(lambda: self._begin(name, seed))
            if found:
                begun.experiment = found.applied(self.experiment, name)
                begun.record = dataclasses.replace(begun.record, **found.record)
        return begun

    def _conclude(self, name: str, begun: "_Begun", fit: Fit | NonFiniteError) -> None:
        with _failing(begun):
            if isinstance(fit, NonFiniteError):
                raise fit
            measured = lambda: self._measure(begun.experiment, name, begun.seed, fit)
            fields = begun.told | processes.first(measured)
            if fit.compile_seconds is not None:
                of_calibration = begun.told.get("compile_seconds", 0.0)
                fields["compile_seconds"] = fit.compile_seconds + of_calibration
            begun.record = dataclasses.replace(begun.record, **fields)

    def _export(self, record: ArmRecord) -> ArmRecord:
        """The record with what the config asks for and it does not have yet."""
        wanted, done = self.experiment.export, record.exports
        formats = [name for name in wanted.formats if name not in done]
        if not formats or (wanted.arms and record.arm not in wanted.arms):
            return record
        folder = self.store.folder(record.arm, record.seed)
        path = folder / PACKED
        found, failed = exports.export(path, folder / exports.FOLDER, formats, self.inputs, wanted)
        # Those that were there have been timed again beside the new ones.
        exported = {
            name: {**done.get(name, {}), **found.get(name, {})}
            for name in (*done, *formats)
            if name not in failed
        }
        record = dataclasses.replace(record, exports=exported, failed_exports=failed)
        self.store.save(record)
        return record

    def _train(self, name: str, begun: Sequence["_Begun"]) -> dict[int, Fit | NonFiniteError]:
        """What training ends with, by seed; seeds that want programs of their own take turns."""
        arm = self.experiment.arms[name]
        if not self.inputs.steps(arm):
            return {one.seed: self._untrained(name, one) for one in begun}
        groups: dict[Hashable, dict[int, tuple[Training, TrainState]]] = {}
        for one in begun:
            task, state = self._task(one.experiment, name, one.seed, one.start)
            groups.setdefault(together.signature(task, state), {})[one.seed] = task, state
        found = {}
        for group in groups.values():
            self.progress.arm(name, list(group), self.inputs.last_step(arm))
            fits = loop.fit_together(
                *zip(*group.values(), strict=True),
                [self.store.folder(name, seed) for seed in group],
                checkpoint_seconds=self.experiment.checkpoint_seconds,
                on_step=self.progress.step,
                tensorboard=self.tensorboard,
            )
            found |= zip(group, fits, strict=True)
        return found

    def _untrained(self, name: str, one: "_Begun") -> Fit:
        self.progress.arm(name, [one.seed], 0)
        model = self.models[one.experiment.arms[name].model]
        measured = lambda: measure.evaluate(model, one.start, self.inputs.validation)
        selected = Selection(weights=one.start, step=0, metrics=processes.first(measured))
        return Fit(last=one.start, last_step=0, selected=selected, seconds=0.0, compile_seconds=0.0)

    def _task(
        self, experiment: Experiment, name: str, seed: int, start: Weights
    ) -> tuple[Training, TrainState]:
        model = self.models[experiment.arms[name].model]
        return training.begin(
            experiment,
            name,
            seed,
            start,
            model=model,
            inputs=self.inputs,
            teaching=processes.in_turn(lambda: self.teachers.of(name, seed)),
            optimizer=self.optimizer,
            validate=lambda weights: measure.evaluate(model, weights, self.validation),
            layout=self.layout,
        )

    def _begin(self, name: str, seed: int) -> tuple[Weights, Found | None, dict[str, Any]]:
        """The weights an arm starts from, its bits by search, what is to be told of calibration."""
        self.store.folder(name, seed).mkdir(parents=True, exist_ok=True)
        for parent in kdq_config.parents(self.experiment, name):
            if self.store.record(parent, seed).status == "failed":
                raise NonFiniteError(f"it needs arm {parent!r}, which failed")
        experiment, found = self.experiment, None
        if experiment.arms[name].bits in experiment.searches:
            found = self.searches.of(experiment.arms[name].bits, seed)
            experiment = found.applied(experiment, name)
        start, told = self._start(experiment, experiment.arms[name], seed)
        return start, found, told

    def _start(self, experiment: Experiment, arm: Arm, seed: int) -> tuple[Weights, dict[str, Any]]:
        """The weights an arm starts from, and what is to be told of their quantization."""
        model = self.models[arm.model]
        if arm.init:
            variables = self.store.weights(arm.init, seed)
        elif arm.load:
            variables = load(arm.load).variables
        else:
            images = self.inputs.batches("train")[0]["image"][:1]
            variables = initial.variables(model, jax.random.key(seed + arm.seed_offset), images)
        if not arm.bits:
            return Weights(variables=variables, qparams={}), {}
        return quantized(
            experiment,
            arm,
            model,
            variables,
            self.inputs.calibration_images(),
            guide=self._guide(arm, seed),
            progress=self.progress,
        )

    def _guide(self, arm: Arm, seed: int) -> Callable[[Array], Array] | None:
        """The teacher's outputs, for an arm that is only calibrated."""
        if arm.epochs or not arm.teacher:
            return None
        model = self.models[self.experiment.arms[arm.teacher].model]
        variables = self.store.weights(arm.teacher, seed)
        return lambda images: quantize.predict(model, variables, {}, images)

    def _measure(self, experiment: Experiment, name: str, seed: int, fit: Fit) -> dict[str, Any]:
        """Returns the fields of a record that are measured."""
        arm = experiment.arms[name]
        digests = digests_of(fit.selected)
        if digests:
            self.store.expect(dataclasses.replace(self._identity(name, seed), **digests))
        record = {"status": "ok", **self._of_file(experiment, name, seed, fit), **digests}
        record["packed_sha256"] = file_digest(self.store.folder(name, seed) / PACKED)
        record |= self._compare(experiment, name, seed, fit)
        if arm.without_classes:
            record |= measure.corrected(
                self.models[arm.model],
                fit.selected.weights,
                self.inputs.validation,
                self.inputs.test,
                arm.without_classes,
            )
        return record

    def _of_file(self, experiment: Experiment, name: str, seed: int, fit: Fit) -> dict[str, Any]:
        arm = experiment.arms[name]
        teacher_is_there = name == experiment.teacher or self._teacher_is_there(name, seed)
        identity = self._identity(name, seed)
        return measure.measure(
            fit,
            self.models[arm.model],
            self.inputs.test,
            self.store.folder(name, seed) / PACKED,
            validation=self.inputs.validation[0],
            model_config=kdq_config.to_json(experiment.models[arm.model]),
            metadata={
                **{key: getattr(identity, key) for key in ("arm", "seed", "bits", "arm_digest")},
                "data": {
                    "name": experiment.data.name,
                    "mean": experiment.data.mean,
                    "std": experiment.data.std,
                },
            },
            teacher_logits=self.teachers.logits(experiment.teacher, seed, "test")
            if teacher_is_there
            else None,
        )

    def _compare(self, experiment: Experiment, name: str, seed: int, fit: Fit) -> dict[str, Any]:
        """The measures of transfer, if the config asks for them and the teacher is there."""
        if not experiment.transfer.examples or not self._teacher_is_there(name, seed):
            return {}
        weights = fit.selected.weights
        student = transfer.Network(
            variables=weights.variables,
            qparams=weights.qparams,
            model=self.models[experiment.arms[name].model],
        )
        return self.comparison(seed).measure(student)

    def _teacher_is_there(self, name: str, seed: int) -> bool:
        """Returns whether arms are compared with the teacher; what it is made of is not."""
        teacher = self.experiment.teacher
        if name in kdq_config.ancestors(self.experiment, teacher):
            return False
        return self.store.record(teacher, seed).status == "ok"

    def _comparison(self, seed: int) -> transfer.Comparison:
        """With the teacher of a seed."""
        config, teacher = self.experiment.transfer, self.experiment.teacher
        network = transfer.Network(
            variables=self.store.weights(teacher, seed),
            qparams={},
            model=self.models[self.experiment.arms[teacher].model],
        )
        images = self.inputs.batches("test", size=config.examples)[0]["image"]
        return transfer.Comparison(network, images, config)

    def _identity(self, name: str, seed: int) -> ArmRecord:
        """Returns a record of what is known before anything runs."""
        arm = self.experiment.arms[name]
        return ArmRecord(
            arm=name,
            seed=seed,
            kind="teacher" if name == self.experiment.teacher else arm.kind,
            bits=arm.bits or "fp32",
            observer=arm.observer if arm.bits else "",
            reference=arm.reference,
            quick=self.experiment.quick,
            config_digest=plan.experiment_digest(self.experiment),
            arm_digest=self.store.digests[name],
            commit=provenance.commit(),
            versions=provenance.versions(),
            device=provenance.device(),
            data={split: source.digest for split, source in self.inputs.splits.items()},
        )


@dataclasses.dataclass(kw_only=True)
class _Begun:
    """An arm and seed that is under way."""

    seed: int
    record: ArmRecord
    experiment: Experiment  # with what a search found
    start: Weights | None = None  # None: it failed before it had any
    told: dict[str, Any] = dataclasses.field(default_factory=dict)  # of calibration


@contextlib.contextmanager
def _failing(begun: _Begun) -> Iterator[None]:
    """Failures that belong into a table: they end a run, and the next one begins."""
    try:
        yield
    except (NonFiniteError, InfeasibleError) as error:
        arm, seed = begun.record.arm, begun.record.seed
        log.error("arm %s, seed %d failed: %s", arm, seed, error)
        reason = f"arm {arm}, seed {seed}: {error}"
        begun.record = dataclasses.replace(begun.record, status="failed", error=reason)


def _build_models(experiment: Experiment) -> dict[str, nn.Module]:
    built = {}
    for key, fields in experiment.models.items():
        try:
            built[key] = models.build(**fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.models.{key}: {error}") from error
    return built
