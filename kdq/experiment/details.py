"""Details of an arm for reports, beyond its record: confusions, reliability, layers, attributions.

`ARM/SEED/details.json`, a few kilobytes: JSON without NaN, maps no larger than 32 by 32.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from scipy.special import softmax

from kdq import files, quantize
from kdq.deploy import PackedModel
from kdq.deploy.measure import energy
from kdq.evaluate import attribution, classification
from kdq.evaluate.run import Scores
from kdq.experiment.inputs import Inputs
from kdq.experiment.transfer import Predictor
from kdq.quantize.layers import LayerInfo, layer_bits
from kdq.quantize.network import Weights
from kdq.quantize.paths import at_path
from kdq.search import bank, cost
from kdq.search.evaluate import distance
from kdq.tasks import Task
from kdq.types import Array, Batch, QParams, Variables

FILE = "details.json"
IMAGES = 6  # of the test split, the first ones: not chosen
SIDE = 32  # pixels of a map at most
BINS = 15  # of confidence
EXAMPLES = 128  # of validation, for sensitivities


def write(
    folder: Path,
    packed: PackedModel,
    layers: Mapping[str, LayerInfo],
    weights: Weights,
    *,
    task: Task,
    scores: Scores,
    inputs: Inputs,
) -> None:
    """Measures and writes the details of an arm.

    `packed` is its file, loaded back, of which `scores` are; `weights` are those before rounding.
    Without classes there are no confusion, reliability and attributions; inputs other than
    [n, height, width, channels] have no maps.
    """
    batch, has_classes = inputs.test[0], "classification" in task.probes
    images = batch[inputs.key][: min(IMAGES, int(np.sum(batch["mask"])))]
    packed_weights = Weights(variables=packed.variables, qparams=packed.qparams)
    predictor = Predictor(weights=packed_weights, network=packed.network)
    shown = dict.fromkeys(("confusion", "reliability", "layers", "attributions"))
    if has_classes:
        arrays = scores.arrays
        shown["confusion"] = confusion(arrays, inputs.classes)
        bins = classification.reliability(arrays["confidence"], arrays["correct"], BINS)
        columns = ("confidence", "accuracy", "count")
        shown["reliability"] = {name: getattr(bins, name).tolist() for name in columns}
        if images.ndim == 4:
            shown["attributions"] = _attributions(predictor, images, arrays["label"])
    shown["layers"] = layer_rows(layers, packed, weights, inputs.validation[0], task)
    files.write_json(folder / FILE, _shortened(shown), indent=None)


def confusion(scores: Mapping[str, np.ndarray], classes: int) -> list[list[int]]:
    """Counts [class][predicted class] of the examples; one with a NaN logit predicts nothing."""
    valid = ~np.isnan(scores["confidence"])
    labels, predicted = (scores[name][valid].astype(np.int64) for name in ("label", "predicted"))
    pairs = labels * classes + predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes).tolist()


def layer_rows(
    layers: Mapping[str, LayerInfo],
    packed: PackedModel,
    weights: Weights,
    validation: Batch,
    task: Task,
) -> list[dict[str, Any]]:
    """Returns a dict for each layer: its bits, what they do to it, and what it costs.

    "sqnr_db" is 10 log10(Σ w² / Σ (w − ŵ)²) of its weights; "range" what its inputs' quantizer
    represents; "sensitivity" how far, by the task's fidelity (KL in nats, RMSE), outputs without
    any quantizer are from those with this layer's alone, on examples of validation. None for what a
    layer does not have.
    """
    variables, qparams = weights.variables, weights.qparams
    sensitivities = _sensitivities(packed, variables, validation, task)
    joules, rows = energy.modelled(layers, qparams), []
    for path, layer in layers.items():
        weight_bits, input_bits = layer_bits(qparams, path)
        rows.append(
            {
                "path": path,
                "kind": layer.kind,
                "weight_bits": weight_bits,
                "input_bits": input_bits,
                "weights": layer.weight_count,
                "bytes": -(-layer.weight_count * weight_bits // 8),
                "macs": layer.macs,
                "bops": cost.bops({path: layer}, qparams),
                "energy_modelled_nj": joules[path].total,
                "sqnr_db": _sqnr(layer, variables, packed) if weight_bits < 32 else None,
                "range": _range(packed.qparams.get(path, {}).get("activations")),
                "sensitivity": sensitivities.get(path),
            }
        )
    return rows


def _sqnr(layer: LayerInfo, variables: Variables, packed: PackedModel) -> float | None:
    if not layer.weight_name:
        return None
    ours, theirs = (
        np.asarray(at_path(tree["params"], layer.path)[layer.weight_name], np.float64)
        for tree in (variables, packed.variables)
    )
    signal, noise = np.sum(ours**2), np.sum((ours - theirs) ** 2)
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def _range(quantizer: quantize.Quantizer | None) -> list[float] | None:
    """The least and the largest number; None if it is found anew from each input."""
    if quantizer is None or quantizer.dynamic is not None:
        return None
    scale = np.asarray(quantizer.scale)
    if quantizer.levels is not None:
        levels = np.asarray(quantizer.levels)
        return [float((levels.min() * scale).min()), float((levels.max() * scale).max())]
    ends = []
    for code in (quantizer.qmin, quantizer.qmax):
        code = np.asarray(code)
        code = code.reshape((*code.shape, *[1] * (scale.ndim - code.ndim)))
        ends.append((code - np.asarray(quantizer.zero_point)) * scale)
    return [float(ends[0].min()), float(ends[1].max())]


def _sensitivities(
    packed: PackedModel, variables: Variables, validation: Batch, task: Task
) -> dict[str, float | None]:
    """By layer, in one compiled program: what is not quantized gets quantizers that do nothing."""
    inputs = [q for quantizers in packed.qparams.values() for q in quantizers.values()]
    if any(q.levels is not None or q.dynamic is not None for q in inputs):
        return {}  # formats and dynamic ranges can't be made to do nothing
    quantized = sorted({*packed.qparams, *packed.weight_quantizers})
    if not quantized:
        return {}
    count = min(EXAMPLES, int(np.sum(validation["mask"])))
    examples = tuple(array[:count] for array in task.inputs(validation))
    idle = _idle(packed.qparams)
    rounded, plain = (traverse_util.flatten_dict(t, sep="/") for t in (packed.variables, variables))

    def outputs(path: str | None) -> Array:
        is_inside = lambda name: path is not None and name.startswith(f"params/{path}/")
        mixed = {name: rounded[name] if is_inside(name) else plain[name] for name in rounded}
        qparams = {**idle, **({path: packed.qparams[path]} if path in idle else {})}
        tree = traverse_util.unflatten_dict(mixed, sep="/")
        return quantize.predict(packed.network, tree, qparams, examples)

    # All are dispatched before the first is waited for.
    base, *alone = [outputs(path) for path in (None, *quantized)]
    moved = (distance(task).compute(_divergence(outputs, base, task=task)) for outputs in alone)
    return dict(zip(quantized, moved, strict=True))


@functools.partial(jax.jit, static_argnames="task")
def _divergence(outputs: Array, reference: Array, *, task: Task) -> dict[str, Array]:
    return task.divergence(outputs, reference)


@jax.jit
def _idle(qparams: QParams) -> QParams:
    is_quantizer = lambda node: isinstance(node, quantize.Quantizer)
    return jax.tree.map(bank.identity_quantizer, qparams, is_leaf=is_quantizer)


def _attributions(predictor: Predictor, images: Array, labels: np.ndarray) -> dict[str, Any]:
    """Gradient times input of the label's logit, with what was seen and predicted."""
    labels = labels[: len(images)].astype(np.int32)
    logits, maps = _explain(predictor, images, labels)
    chance = softmax(np.asarray(logits, np.float64), axis=-1)
    return {
        "images": _small(np.asarray(images, np.float64).mean(-1)),
        "maps": _small(np.asarray(maps, np.float64).sum(-1)),
        "label": labels.tolist(),
        "predicted": chance.argmax(-1).tolist(),
        "probability": chance.max(-1).tolist(),
    }


@jax.jit
def _explain(predictor: Predictor, images: Array, labels: Array) -> tuple[Array, Array]:
    return predictor(images), attribution.gradient_times_input(predictor, images, labels)


def _small(maps: np.ndarray) -> list[Any]:
    """[n, height, width], as means over blocks if larger than `SIDE`."""
    block = -(-max(maps.shape[1:]) // SIDE)
    height, width = (size // block * block for size in maps.shape[1:])
    cut = maps[:, :height, :width].reshape(len(maps), height // block, block, width // block, block)
    return cut.mean((2, 4)).tolist()


def _shortened(value: Any) -> Any:
    """Returns a value with numbers of four digits."""
    if isinstance(value, Mapping):
        return {key: _shortened(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_shortened(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
