"""The numbers of one arm: of the file it ends in, loaded back, on the test split."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq import deploy, models, quantize
from kdq.deploy.measure import energy
from kdq.evaluate import classification, metrics, run
from kdq.evaluate.run import Reference, Scores
from kdq.experiment import details
from kdq.experiment.inputs import Inputs
from kdq.quantize.network import Weights
from kdq.search import cost
from kdq.tasks import Task
from kdq.train.loop import Fit
from kdq.types import Array, Batch

SCORES = "scores.npz"  # see kdq.evaluate.run.Scores
PROBES = (
    "agreement_where_teacher_wrong",
    "top5_accuracy",
    "brier",
    "ece",
    "adaptive_ece",
)


def pack(
    weights: Weights,
    model: nn.Module,
    images: Array,
    path: Path,
    *,
    model_config: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> Weights:
    """Writes a packed file; returns the weights in it, which are those that integers compute with.

    Args:
      weights: that training (or calibration) selected.
      model: the module of the weights.
      images: some inputs, [n, ...].
      path: the file.
      model_config: the model's name and fields, as `kdq.models.build` takes them.
      metadata: kept in the file.
    """
    if weights.qparams:  # what the file simulates is what integers compute
        variables = deploy.lower(model, weights, images).simulated(weights.variables)
        weights = Weights(variables=variables, qparams=weights.qparams)
    deploy.save_packed(path, weights, model=model_config, inputs=images[:1], metadata=metadata)
    return weights


def measure(
    fit: Fit,
    weights: Weights,
    model: nn.Module,
    inputs: Inputs,
    path: Path,
    *,
    teacher: Reference | None,
    teacher_scores: Scores | None,
) -> dict[str, Any]:
    """Loads a packed file back and measures it.

    Leaves beside it `details.FILE`, for reports, and SCORES, the scores of each prediction on test.

    Args:
      fit: what training (or calibration) ended with.
      weights: from `pack`.
      model: the module of the weights.
      inputs: the data.
      path: of the file.
      teacher: its outputs for a batch, or None for no fidelity.
      teacher_scores: of the teacher itself on the test split, or None.

    Returns:
      The fields of the record that are measured.
    """
    selected, task, test = fit.selected, inputs.task, inputs.test
    variables, qparams = weights.variables, weights.qparams
    packed = deploy.load_packed(path)
    packed_weights = Weights(variables=packed.variables, qparams=packed.qparams)
    scores = run.evaluate(packed.network, packed_weights, task, test, teacher)
    scores.save(path.parent / SCORES)
    values = scores.values(*task.metrics)
    last = values
    if fit.last_step != selected.step:
        last = evaluate(model, fit.last, task, test)
    layers = quantize.list_layers(model, variables, test[0][inputs.key])
    details.write(path.parent, packed, layers, weights, task=task, scores=scores, inputs=inputs)
    energies = energy.modelled(layers, qparams).values()
    return {
        "params": models.count_parameters(variables),
        "metrics": {"test": values, "test_last": last, "validation": selected.metrics},
        "fidelity": {m.name: scores.values(m).get(m.name, math.nan) for m in task.fidelity},
        **(_probe(scores, teacher_scores, inputs) if "classification" in task.probes else {}),
        "macs": cost.macs(layers),
        "bops": cost.bops(layers, qparams),
        "energy_modelled_nj": sum(layer.total for layer in energies),
        "size_bytes": path.stat().st_size,
        "train_seconds": fit.seconds,
        "steps": fit.last_step,
        "selected_step": selected.step,
        "selected_on": "validation" if fit.last_step else "calibration only",
    }


def _probe(scores: Scores, teacher: Scores | None, inputs: Inputs) -> dict[str, Any]:
    """Returns the fields of a record that are measured of classifiers alone."""
    arrays = dict(scores.arrays)
    if teacher is not None:
        arrays["teacher_correct"] = teacher.arrays["correct"]
    probed = classification.summarize(arrays)
    return {
        **{name: probed.get(name, math.nan) for name in PROBES},
        "accuracy_by_class": _by_class(arrays, inputs.classes),
    }


def corrected(
    model: nn.Module,
    weights: Weights,
    task: Task,
    inputs: Inputs,
    classes: Sequence[int],
) -> dict[str, Any]:
    """Returns test accuracy once validation chose the bias of classes that the arm never saw."""
    outputs = run.outputs_of(model, weights, task)
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


def _by_class(scores: Mapping[str, np.ndarray], classes: int) -> tuple[float, ...]:
    """Returns the accuracy of each class."""
    recalls = classification.accuracy_by_class(scores["label"], scores["correct"], classes)
    return tuple(recalls.tolist())


def evaluate(
    model: nn.Module, weights: Weights, task: Task, batches: Iterable[Batch]
) -> dict[str, float]:
    """Returns the task's metrics of a float or quantized model."""
    return run.evaluate(model, weights, task, batches).values(*task.metrics)
