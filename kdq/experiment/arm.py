"""One arm and seed under way: it starts, is calibrated, trained, packed, measured and exported."""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np

from kdq import config as kdq_config
from kdq import deploy, models, processes, quantize
from kdq.deploy.measure import energy
from kdq.evaluate import classification, metrics, run
from kdq.evaluate.run import Reference, Scores, outputs_of
from kdq.experiment import details, exports, searching, training, transfer
from kdq.experiment.context import Context
from kdq.experiment.quantized import quantized
from kdq.experiment.searching import SearchResult
from kdq.experiment.store import PACKED, digests_of, file_digest, fresh_variables, load
from kdq.quantize.network import Weights
from kdq.record import ArmRecord
from kdq.search import cost
from kdq.search.problem import InfeasibleError
from kdq.tasks import Task
from kdq.train import loop, together
from kdq.train.loop import Fit, Selection
from kdq.train.step import NonFiniteError
from kdq.train.training import Plan, TrainState
from kdq.types import Batch, Variables

T = TypeVar("T")
log = logging.getLogger(__name__)

SCORES = "scores.npz"  # see kdq.evaluate.run.Scores
PROBES = (  # of classifiers alone
    "agreement_where_teacher_wrong",
    "top5_accuracy",
    "brier",
    "ece",
    "adaptive_ece",
)


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
        return fresh_variables(self.context.model(self.arm), key, self.context.example), policy

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
                evaluate, model, task=context.task, batches=context.validation
            ),
            layout=context.layout,
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
        context, data, weights = self.context, self.experiment.data, fit.selected.weights
        path = context.store.folder(self.name, self.seed) / PACKED
        if digests := digests_of(fit.selected):
            context.store.expect(dataclasses.replace(self.record, **digests))
        images = context.inputs.test[0][context.inputs.key]
        if weights.qparams:  # what the file simulates is what integers compute
            lowered = deploy.lower(context.model(self.arm), weights, images)
            variables = lowered.simulated(weights.variables)
            weights = Weights(variables=variables, qparams=weights.qparams)
        self.weights = weights
        deploy.save_packed(
            path,
            weights,
            model=kdq_config.to_json(self.experiment.models[self.arm.model]),
            inputs=images[:1],
            metadata={
                **{key: getattr(self.record, key) for key in ("arm", "seed", "bits", "arm_digest")},
                "data": {"name": data.name, "mean": data.mean, "std": data.std},
            },
        )
        return {**digests, "packed_sha256": file_digest(path)}

    def measure(self, fit: Fit) -> dict[str, Any]:
        """Returns the fields that are measured: of the packed file, loaded back, on test.

        Leaves beside it `details.FILE`, for reports, and SCORES, of each prediction on test.
        """
        context, inputs, task = self.context, self.context.inputs, self.context.task
        model, selected, test = context.model(self.arm), fit.selected, inputs.test
        compared = context.has_teacher(self.name, self.seed)
        teacher = teacher_scores = None
        if compared or self.name == self.experiment.teacher:
            teacher, teacher_scores = self._teacher()
        path = context.store.folder(self.name, self.seed) / PACKED
        packed = deploy.load_packed(path)
        packed_weights = Weights(variables=packed.variables, qparams=packed.qparams)
        scores = run.evaluate(packed.network, packed_weights, task, test, teacher)
        scores.save(path.parent / SCORES)
        values = scores.values(*task.metrics)
        is_last = fit.last_step == selected.step
        layers = quantize.list_layers(model, self.weights.variables, test[0][inputs.key])
        details.write(
            path.parent, packed, layers, self.weights, task=task, scores=scores, inputs=inputs
        )
        energies = energy.modelled(layers, self.weights.qparams).values()
        fields = {
            "params": models.count_parameters(self.weights.variables),
            "metrics": {
                "test": values,
                "test_last": values if is_last else evaluate(model, fit.last, task, test),
                "validation": selected.metrics,
            },
            "fidelity": {m.name: scores.values(m).get(m.name, math.nan) for m in task.fidelity},
            "macs": cost.macs(layers),
            "bops": cost.bops(layers, self.weights.qparams),
            "energy_modelled_nj": sum(layer.total for layer in energies),
            "size_bytes": path.stat().st_size,
            "train_seconds": fit.seconds,
            "steps": fit.last_step,
            "selected_step": selected.step,
            "selected_on": "validation" if fit.last_step else "calibration only",
        }
        if "classification" in task.probes:
            arrays = dict(scores.arrays)
            if teacher_scores is not None:
                arrays["teacher_correct"] = teacher_scores.arrays["correct"]
            probed = classification.summarize(arrays)
            fields |= {name: probed.get(name, math.nan) for name in PROBES}
            fields["accuracy_by_class"] = _by_class(arrays, inputs.classes)
        if compared and self.experiment.transfer.examples:
            student = transfer.Predictor(weights=selected.weights, network=model)
            fields |= self._comparison().measure(student)
        if self.arm.without_classes:
            fields |= self._corrected(selected.weights)
        return fields

    def _corrected(self, weights: Weights) -> dict[str, Any]:
        """Returns test accuracy once validation chose the bias of classes that it never saw."""
        inputs, task, classes = self.context.inputs, self.context.task, self.arm.without_classes
        outputs = outputs_of(self.context.model(self.arm), weights, task)
        labels = {name: inputs.read_labels(name, task.target) for name in ("validation", "test")}
        before, after = (metrics.predict(outputs, x) for x in (inputs.validation, inputs.test))
        offset = classification.class_offset(before, labels["validation"], classes)
        after[:, list(classes)] += offset
        scores = jax.device_get(task.scores(after, {task.target: labels["test"]}))
        return {
            "class_offset": offset,
            "accuracy_corrected": task.primary.compute(scores),
            "accuracy_by_class_corrected": _by_class(scores, after.shape[1]),
        }

    def _teacher(self) -> tuple[Reference, Scores]:
        """Returns the teacher's outputs for a batch, and its own scores on the test split."""
        model, weights = self._teacher_network()
        task, test = self.context.task, self.context.inputs.test
        make = lambda: run.evaluate(model, weights, task, test)
        return outputs_of(model, weights, task), self._once("teacher's scores", make)

    def _comparison(self) -> transfer.Comparison:
        """Returns what is measured of the teacher once for all arms of a seed."""

        def make() -> transfer.Comparison:
            model, weights = self._teacher_network()
            inputs = self.context.inputs
            images = inputs.split("test", config.examples)[0][inputs.key]
            predictor = transfer.Predictor(weights=weights, network=model)
            return transfer.Comparison(predictor, images, config, self.context.task.probes)

        config = self.experiment.transfer
        return self._once("comparison", make)

    def _teacher_network(self) -> tuple[nn.Module, Weights]:
        name = self.experiment.teacher
        variables = self.context.store.weights(name, self.seed)
        return self.context.model(name), Weights(variables=variables, qparams={})

    def _once(self, kind: str, make: Callable[[], T]) -> T:
        # All arms of seeds that go together run before those of the next.
        return self.context.once(kind, self.seed, make, self.experiment.seeds_at_once)


def evaluate(
    model: nn.Module, weights: Weights, task: Task, batches: Iterable[Batch]
) -> dict[str, float]:
    """Returns the task's metrics of a float or quantized model."""
    return run.evaluate(model, weights, task, batches).values(*task.metrics)


def _by_class(scores: Mapping[str, np.ndarray], classes: int) -> tuple[float, ...]:
    """Returns the accuracy of each class."""
    recalls = classification.accuracy_by_class(scores["label"], scores["correct"], classes)
    return tuple(recalls.tolist())


def train(runs: Sequence[ArmRun]) -> list[Fit | NonFiniteError]:
    """Returns what the training of an arm ends with, for each of its seeds in `runs`.

    Seeds whose steps are one program train together, the others one group after another.
    """
    if not runs:
        return []
    context, name = runs[0].context, runs[0].name
    arm = context.experiment.arms[name]
    if not context.inputs.steps(arm):  # it ends with what it starts with
        return [_keep_start(each) for each in runs]
    groups: dict[Hashable, dict[int, tuple[Plan, TrainState]]] = {}
    for each in runs:
        plan, state = each.make_plan()
        groups.setdefault(together.signature(plan, state), {})[each.seed] = plan, state
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
    return [fits[each.seed] for each in runs]


def _keep_start(arm_run: ArmRun) -> Fit:
    context, weights = arm_run.context, arm_run.weights
    context.progress.arm(arm_run.name, [arm_run.seed], 0)
    model, validation = context.model(arm_run.arm), context.inputs.validation
    scores = processes.first(lambda: evaluate(model, weights, context.task, validation))
    selected = Selection(weights=weights, step=0, metrics=scores)
    return Fit(last=weights, last_step=0, selected=selected, seconds=0.0, compile_seconds=0.0)


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
