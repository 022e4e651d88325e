"""One arm and seed under way: it starts, is calibrated, trained, packed, measured and exported."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax

from kdq import config as kdq_config
from kdq import processes, quantize
from kdq.evaluate.run import Reference, Scores, evaluate, outputs_of
from kdq.experiment import exports, initial, measure, searching, training, transfer
from kdq.experiment.context import Context
from kdq.experiment.quantized import quantized
from kdq.experiment.records import digests_of, file_digest
from kdq.experiment.searching import SearchResult
from kdq.experiment.store import PACKED, load
from kdq.quantize.network import Weights
from kdq.record import ArmRecord
from kdq.search.problem import InfeasibleError
from kdq.train import loop, together
from kdq.train.loop import Fit, Selection
from kdq.train.step import NonFiniteError
from kdq.train.training import Plan, TrainState
from kdq.types import Variables

log = logging.getLogger(__name__)


class ArmRun:
    """One arm and seed under way. Of several processes all train; the first one does all else.

    `record` grows as it goes; once the arm has failed, it says why, and nothing more is done.
    """

    def __init__(self, context: Context, name: str, seed: int):
        self.context, self.name, self.seed = context, name, seed
        self.experiment = context.experiment  # with the policy of its search, after `prepare`
        self.record = processes.first(lambda: context.identify(name, seed))
        # That it starts from, and in the end those in its file; None: it failed before it had any.
        self.weights: Weights | None = None
        self._calibration: dict[str, Any] = {}

    @property
    def arm(self) -> kdq_config.Arm:
        return self.experiment.arms[self.name]

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Records a failure that belongs into a table: it ends this run, and no other."""
        try:
            yield
        except (NonFiniteError, InfeasibleError) as error:
            reason = f"arm {self.name}, seed {self.seed}"
            log.error("%s failed: %s", reason, error)
            self.record = dataclasses.replace(
                self.record, status="failed", error=f"{reason}: {error}"
            )

    def prepare(self) -> None:
        """Starts and calibrates it: after that it has weights to train, or has failed."""
        self.context.progress.prepare(self.name, self.seed)

        def start() -> tuple[Weights, dict[str, Any], SearchResult | None]:
            variables, policy = self.start()
            return *self.calibrate(variables), policy

        with self._failing():
            self.weights, self._calibration, policy = processes.first(start)
            self._apply(policy)

    def _apply(self, policy: SearchResult | None) -> None:
        if policy:
            self.experiment = policy.applied(self.context.experiment, self.name)
            self.record = dataclasses.replace(self.record, **policy.record)

    def start(self) -> tuple[Variables, SearchResult | None]:
        """Returns the variables that it starts from, and the policy that a search chose."""
        store, experiment, policy = self.context.store, self.experiment, None
        store.folder(self.name, self.seed).mkdir(parents=True, exist_ok=True)
        for parent in kdq_config.parents(experiment, self.name):
            if store.record(parent, self.seed).status == "failed":
                raise NonFiniteError(f"it needs arm {parent!r}, which failed")
        if self.arm.bits in experiment.searches:
            policy = searching.result(self.context, self.arm.bits, self.seed)
            self._apply(policy)
        if self.arm.init:
            return store.weights(self.arm.init, self.seed), policy
        if self.arm.load:
            return load(self.arm.load).variables, policy
        key = jax.random.key(self.seed + self.arm.seed_offset)
        return initial.variables(self.context.model(self.arm), key, self.context.example), policy

    def calibrate(self, variables: Variables) -> tuple[Weights, dict[str, Any]]:
        """Returns the weights to train, with quantizers if it has bits, and record fields."""
        if not self.arm.bits:
            return Weights(variables=variables, qparams={}), {}
        guide = None
        if self.arm.teacher and not self.arm.epochs:  # of methods that ask a teacher
            teacher = self.arm.teacher
            taught_by = self.context.store.weights(teacher, self.seed)
            guide = lambda images: quantize.predict(
                self.context.model(teacher), taught_by, {}, images
            )
        return quantized(
            self.experiment,
            self.arm,
            self.context.model(self.arm),
            variables,
            self.context.inputs.calibration_batches(),
            guide=guide,
            progress=self.context.progress,
            categorical=self.context.task.categorical,
        )

    def make_plan(self) -> tuple[Plan, TrainState]:
        """Returns the plan of its training and the state before the first step."""
        context, model = self.context, self.context.model(self.arm)
        return training.make_plan(
            self.experiment,
            self.name,
            self.seed,
            self.weights,
            model=model,
            inputs=context.inputs,
            teaching=processes.in_turn(lambda: context.teachers.teaching(self.name, self.seed)),
            validate=functools.partial(
                measure.evaluate, model, task=context.task, batches=context.validation
            ),
            layout=context.layout,
        )

    def keep_start(self) -> Fit:
        """Returns what an arm ends with that does not train."""
        self.context.progress.arm(self.name, [self.seed], 0)
        model, validation = self.context.model(self.arm), self.context.inputs.validation
        metrics = processes.first(
            lambda: measure.evaluate(model, self.weights, self.context.task, validation)
        )
        selected = Selection(weights=self.weights, step=0, metrics=metrics)
        return Fit(
            last=self.weights, last_step=0, selected=selected, seconds=0.0, compile_seconds=0.0
        )

    def conclude(self, fit: Fit | NonFiniteError) -> None:
        """Packs and measures what training ended with."""
        with self._failing():
            if isinstance(fit, NonFiniteError):
                raise fit
            fields = self._calibration | processes.first(lambda: self.pack(fit) | self.measure(fit))
            if fit.compile_seconds is not None:
                calibration_seconds = self._calibration.get("compile_seconds", 0.0)
                fields["compile_seconds"] = fit.compile_seconds + calibration_seconds
            self.record = dataclasses.replace(self.record, **fields)

    def save(self) -> None:
        processes.first(lambda: self.context.store.save(self.record))

    def pack(self, fit: Fit) -> dict[str, Any]:
        """Writes the packed file of the selected weights; returns the fields that are about it."""
        context, data = self.context, self.experiment.data
        path = context.store.folder(self.name, self.seed) / PACKED
        if digests := digests_of(fit.selected):
            context.store.expect(dataclasses.replace(self.record, **digests))
        self.weights = measure.pack(
            fit.selected.weights,
            context.model(self.arm),
            context.inputs.test[0][context.inputs.key],
            path,
            model_config=kdq_config.to_json(self.experiment.models[self.arm.model]),
            metadata={
                **{key: getattr(self.record, key) for key in ("arm", "seed", "bits", "arm_digest")},
                "data": {"name": data.name, "mean": data.mean, "std": data.std},
            },
        )
        return {**digests, "packed_sha256": file_digest(path)}

    def measure(self, fit: Fit) -> dict[str, Any]:
        """Returns the fields that are measured: of the packed file, loaded back, on test."""
        context, inputs = self.context, self.context.inputs
        model, weights = context.model(self.arm), fit.selected.weights
        compared = context.has_teacher(self.name, self.seed)
        teacher = teacher_scores = None
        if compared or self.name == self.experiment.teacher:
            teacher, teacher_scores = self._teacher()
        path = context.store.folder(self.name, self.seed) / PACKED
        fields = measure.measure(
            fit,
            self.weights,
            model,
            inputs,
            path,
            teacher=teacher,
            teacher_scores=teacher_scores,
        )
        if compared and self.experiment.transfer.examples:
            student = transfer.Predictor(weights=weights, network=model)
            fields |= self._comparison().measure(student)
        if self.arm.without_classes:
            fields |= measure.corrected(
                model, weights, context.task, inputs, self.arm.without_classes
            )
        return fields

    def _teacher(self) -> tuple[Reference, Scores]:
        """Returns the teacher's outputs for a batch, and its own scores on the test split."""
        context, name = self.context, self.experiment.teacher
        weights = Weights(variables=context.store.weights(name, self.seed), qparams={})
        model, task = context.model(name), context.task

        def make() -> Scores:
            return evaluate(model, weights, task, context.inputs.test)

        most = self.experiment.seeds_at_once
        scores = context.once("teacher's scores", self.seed, make, most)
        return outputs_of(model, weights, task), scores

    def _comparison(self) -> transfer.Comparison:
        """Returns what is measured of the teacher once for all arms of a seed."""
        context, config = self.context, self.experiment.transfer
        teacher = self.experiment.teacher

        def make() -> transfer.Comparison:
            weights = Weights(variables=context.store.weights(teacher, self.seed), qparams={})
            predictor = transfer.Predictor(weights=weights, network=context.model(teacher))
            images = context.inputs.split("test", config.examples)[0][context.inputs.key]
            return transfer.Comparison(predictor, images, config, context.task.probes)

        # All arms of seeds that go together run before those of the next.
        most = self.experiment.seeds_at_once
        return context.once("comparison", self.seed, make, most)


def train(runs: Sequence[ArmRun]) -> list[Fit | NonFiniteError]:
    """Returns what the training of an arm ends with, for each of its seeds in `runs`.

    Seeds whose steps are one program train together, the others one group after another.
    """
    if not runs:
        return []
    context, name = runs[0].context, runs[0].name
    arm = context.experiment.arms[name]
    if not context.inputs.steps(arm):
        return [run.keep_start() for run in runs]
    groups: dict[Hashable, dict[int, tuple[Plan, TrainState]]] = {}
    for run in runs:
        plan, state = run.make_plan()
        groups.setdefault(together.signature(plan, state), {})[run.seed] = plan, state
    fits: dict[int, Fit | NonFiniteError] = {}
    for group in groups.values():
        context.progress.arm(name, list(group), context.inputs.last_step(arm))
        ends = loop.fit_together(
            *zip(*group.values(), strict=True),
            [context.store.folder(name, seed) for seed in group],
            checkpoint_seconds=context.experiment.checkpoint_seconds,
            on_step=context.progress.step,
            tensorboard=context.tensorboard,
        )
        fits |= zip(group, ends, strict=True)
    return [fits[run.seed] for run in runs]


def export(context: Context, record: ArmRecord) -> ArmRecord:
    """Returns a record with the exports that the config asks for, made if it lacks them."""
    config = context.experiment.export
    done = {
        name: entry
        for name, entry in record.exports.items()
        if entry.get("fixed_point", False) == config.fixed_point
    }
    formats = [name for name in config.formats if name not in done]
    if not formats or (config.arms and record.arm not in config.arms):
        return record
    folder = context.store.folder(record.arm, record.seed)
    files, failed = exports.export(
        folder / PACKED,
        folder / exports.FOLDER,
        formats,
        context.inputs,
        config,
    )
    # Those that were there have been timed again beside the new ones.
    exported = {
        name: {**done.get(name, {}), **files.get(name, {})}
        for name in (*done, *formats)
        if name not in failed
    }
    record = dataclasses.replace(record, exports=exported, failed_exports=failed)
    context.store.save(record)
    return record
