"""The numbers of one arm: of the file it ends in, loaded back, on the test split."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from kdq import deploy, models, quantize
from kdq.deploy.measure import energy
from kdq.evaluate import fidelity, metrics, prior
from kdq.experiment import details
from kdq.quantize.network import Weights
from kdq.search import cost
from kdq.train.loop import Fit
from kdq.types import Batch

FIDELITY = (
    "agreement",
    "kl_to_teacher",
    "agreement_where_teacher_wrong",
    "top5_accuracy",
    "brier",
    "ece",
    "adaptive_ece",
)


def measure(
    fit: Fit,
    model: nn.Module,
    test: Sequence[Batch],
    path: Path,
    *,
    validation: Batch,
    model_config: dict[str, Any],
    metadata: dict[str, Any],
    teacher_logits: np.ndarray | None,
) -> dict[str, Any]:
    """Packs the selected weights, loads the file back, and measures that.

    Beside the file it leaves `details.FILE`, for reports.

    Args:
      fit: what training (or calibration) ended with.
      model: the module of the weights.
      test: batches of the test split.
      path: the packed file to write.
      validation: a batch of the validation split, for the details.
      model_config: the model's name and fields, as `kdq.models.build` takes them.
      metadata: kept in the file.
      teacher_logits: [examples, classes] on the test split, or None for no fidelity.

    Returns:
      The part of the record that is measured.
    """
    selected = fit.selected
    variables, qparams = selected.weights.variables, selected.weights.qparams
    if qparams:  # what the file simulates is what integers compute
        integer = deploy.lower(model, variables, qparams, test[0]["image"], train=False)
        variables = integer.simulated(variables)
    size = deploy.save_packed(
        path,
        variables,
        qparams,
        model=model_config,
        inputs=test[0]["image"][:1],
        metadata=metadata,
    )
    packed = deploy.load_packed(path)
    of_file = Weights(variables=packed.variables, qparams=packed.qparams)
    logits = predict(packed.model, of_file, test)
    labels = _labels(test)
    found = fidelity.transfer_summary(logits, labels, teacher_logits)
    last = found
    if fit.last_step != selected.step:
        last = evaluate(model, fit.last, test)
    layers = quantize.list_layers(model, variables, test[0]["image"])
    details.write(
        path.parent,
        packed,
        layers,
        variables,
        qparams,
        logits=logits,
        labels=labels,
        images=test[0]["image"],
        validation=validation,
    )
    return {
        "params": models.count_parameters(variables),
        "accuracy": found["accuracy"],
        "nll": found["nll"],
        "accuracy_last": last["accuracy"],
        "nll_last": last["nll"],
        **{name: found.get(name, math.nan) for name in FIDELITY},
        "accuracy_by_class": tuple(fidelity.accuracy_by_class(logits, labels).tolist()),
        "validation_accuracy": selected.metrics["accuracy"],
        "validation_nll": selected.metrics["nll"],
        "macs": cost.macs(layers),
        "bops": cost.bops(layers, qparams),
        "energy_modelled_nj": sum(one.total for one in energy.modelled(layers, qparams).values()),
        "size_bytes": size,
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
    """Test accuracy once the bias of classes that the arm never saw is chosen on validation."""
    logits, labels = predict(model, weights, test), _labels(test)
    offset = prior.class_offset(predict(model, weights, validation), _labels(validation), classes)
    logits[:, list(classes)] += offset
    return {
        "class_offset": offset,
        "accuracy_corrected": float(metrics.correct(logits, labels).mean()),
        "accuracy_by_class_corrected": tuple(fidelity.accuracy_by_class(logits, labels).tolist()),
    }


def _labels(batches: Sequence[Batch]) -> np.ndarray:
    return np.concatenate([np.asarray(b["label"])[np.asarray(b["mask"]) > 0] for b in batches])


def evaluate(model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, float]:
    """Accuracy and NLL of a float or quantized model."""
    return metrics.evaluate(_apply(model, weights), weights.variables, batches)


def predict(model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> np.ndarray:
    """Logits [examples, classes] of a float or quantized model."""
    return metrics.predict(_apply(model, weights), weights.variables, batches)


def _apply(model: nn.Module, weights: Weights) -> metrics.ImageApply:
    return lambda variables, images: quantize.predict(model, variables, weights.qparams, images)
