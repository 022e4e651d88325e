"""The numbers of one arm: of the file it ends in, loaded back, on the test split."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from kdq import deploy, models, quantize
from kdq.deploy.measure import energy
from kdq.evaluate import classification, metrics
from kdq.experiment import details
from kdq.experiment.inputs import Inputs
from kdq.quantize.network import Weights
from kdq.search import cost
from kdq.train.loop import Fit
from kdq.types import Array, Batch

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
    teacher_logits: np.ndarray | None,
) -> dict[str, Any]:
    """Loads a packed file back and measures it; leaves `details.FILE` beside it, for reports.

    Args:
      fit: what training (or calibration) ended with.
      weights: from `pack`.
      model: the module of the weights.
      inputs: the data.
      path: of the file.
      teacher_logits: [examples, classes] on the test split, or None for no fidelity.

    Returns:
      The fields of the record that are measured.
    """
    selected, test = fit.selected, inputs.test
    variables, qparams = weights.variables, weights.qparams
    packed = deploy.load_packed(path)
    packed_weights = Weights(variables=packed.variables, qparams=packed.qparams)
    logits = predict(packed.network.module, packed_weights, test)
    labels = _labels(test)
    scores = classification.summarize(metrics.score(logits, labels, teacher_logits))
    last = scores
    if fit.last_step != selected.step:
        last = evaluate(model, fit.last, test)
    layers = quantize.list_layers(model, variables, test[0]["image"])
    details.write(path.parent, packed, layers, weights, logits=logits, labels=labels, inputs=inputs)
    energies = energy.modelled(layers, qparams).values()
    return {
        "params": models.count_parameters(variables),
        "metrics": {
            "test": {name: scores[name] for name in ("accuracy", "nll")},
            "test_last": {name: last[name] for name in ("accuracy", "nll")},
            "validation": selected.metrics,
        },
        "fidelity": {name: scores.get(name, math.nan) for name in ("agreement", "kl_to_teacher")},
        **{name: scores.get(name, math.nan) for name in PROBES},
        "accuracy_by_class": _by_class(logits, labels),
        "macs": cost.macs(layers),
        "bops": cost.bops(layers, qparams),
        "energy_modelled_nj": sum(layer.total for layer in energies),
        "size_bytes": path.stat().st_size,
        "train_seconds": fit.seconds,
        "steps": fit.last_step,
        "selected_step": selected.step,
        "selected_on": "validation" if fit.last_step else "calibration only",
    }


def corrected(
    model: nn.Module,
    weights: Weights,
    validation: Sequence[Batch],
    test: Sequence[Batch],
    classes: Sequence[int],
) -> dict[str, Any]:
    """Returns test accuracy once validation chose the bias of classes that the arm never saw."""
    logits, labels = predict(model, weights, test), _labels(test)
    before = predict(model, weights, validation)
    offset = classification.class_offset(before, _labels(validation), classes)
    logits[:, list(classes)] += offset
    return {
        "class_offset": offset,
        "accuracy_corrected": float(metrics.correct(logits, labels).mean()),
        "accuracy_by_class_corrected": _by_class(logits, labels),
    }


def _by_class(logits: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    correct = metrics.correct(logits, labels)
    return tuple(classification.accuracy_by_class(labels, correct, logits.shape[1]).tolist())


def _labels(batches: Sequence[Batch]) -> np.ndarray:
    return np.concatenate([np.asarray(b["label"])[np.asarray(b["mask"]) > 0] for b in batches])


def evaluate(model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, float]:
    """Returns accuracy and NLL of a float or quantized model."""
    return metrics.evaluate(_apply(model, weights), weights.variables, batches)


def predict(model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> np.ndarray:
    """Returns logits [examples, classes] of a float or quantized model."""
    return metrics.predict(_apply(model, weights), weights.variables, batches)


def _apply(model: nn.Module, weights: Weights) -> metrics.ImageApply:
    return lambda variables, images: quantize.predict(model, variables, weights.qparams, images)
