"""Batch norms folded into the layers before them, without editing the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from kdq.quantize.inputs import Inputs
from kdq.quantize.layers import LayerInfo, list_layers
from kdq.quantize.network import Network, Weights
from kdq.quantize.paths import copied
from kdq.quantize.ptq import norms as norms_lib
from kdq.quantize.ptq.norms import Norm, list_norms
from kdq.quantize.ptq.options import Progress, ptq_method, quiet
from kdq.quantize.ptq.watch import output_channels
from kdq.types import Array, QParams, Variables


@ptq_method(before_calibration=True)
def fold_batch_norm(
    network: Network,
    variables: Variables,
    qparams: QParams,
    batches: Sequence[Inputs],
    *,
    tolerance: float = 1e-5,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """Moves each batch norm's factor into the layer whose output it normalizes.

    With f = scale / sqrt(var + epsilon), the weight becomes weight * f for each output channel
    (arXiv:1712.05877, §3.2). A layer with a bias gets (bias - mean) * f + the norm's bias; else
    the norm keeps the offset, as its bias or, if it has none, as minus its mean. The norm stays
    where it is and does nothing else: variance 1 - epsilon, scale 1. The sums are float64.

    A norm is left as it is, with a warning that gives the reason, if its input is not the output
    of a layer, if its axis is no output channel of that, or if the model's output would change:
    that is how one finds a layer whose output is also used elsewhere.

    Args beside those of `options.ptq_method`:
      tolerance: allowed change of the output, relative to its largest magnitude. A model that
        computes in bfloat16 needs more.
    """
    inputs = batches[0]
    layers = list_layers(network, variables, inputs)
    norms = list_norms(network, variables, inputs)
    if not norms:
        logging.warning("fold_batch_norm: the model has no batch norm")
        return variables, {}
    forward = jax.jit(
        lambda variables: network.run(Weights(variables=variables, qparams={}), inputs)[0]
    )
    reference = forward(variables)
    pairs = []
    for norm in norms.values():
        if reason := _why_not(norm, layers):
            logging.warning("fold_batch_norm: %r stays: %s", norm.path, reason)
        else:
            pairs.append((norm, layers[norm.source]))
    folded = variables
    for pair in pairs:
        folded = _fold(folded, *pair)
    change = _change(reference, forward(folded))
    if change > tolerance:  # one of them can't be: find it
        folded = variables
        for norm, layer in progress(pairs, "folding batch norms"):
            candidate = _fold(folded, norm, layer)
            change = _change(reference, forward(candidate))
            if change <= tolerance:
                folded = candidate
                continue
            logging.warning(
                "fold_batch_norm: %r stays: the model's output would change by %.1e of its "
                "largest value (tolerance %.1e); is the output of %r used elsewhere?",
                *(norm.path, change, tolerance, layer.path),
            )
    return folded, {}


def _why_not(norm: Norm, layers: Mapping[str, LayerInfo]) -> str:
    if norm.source is None:
        return norm.reason
    layer = layers.get(norm.source)
    if layer is None:
        return f"{norm.source!r} can't be quantized, see list_unquantized"
    if not set(norm.axes) <= set(output_channels(layer)):
        return f"its axes {norm.axes} are not output channels of {layer.kind} {layer.path!r}"
    if norm.stack != layer.stack:
        return f"its stack is {norm.stack}, that of {layer.path!r} is {layer.stack}"
    return ""


def _fold(variables: Variables, norm: Norm, layer: LayerInfo) -> Variables:
    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    own_layer = copied(params, layer.path, "batch norms")
    own_stats = copied(stats, norm.path, "batch norms")
    norm_params = norms_lib.params_of(norm, variables)
    factor, offset = norms_lib.affine(norm, variables)

    channels, depth = output_channels(layer), len(layer.stack)
    axes = [channels[axis] for axis in norm.axes]
    weight = own_layer[layer.weight_name]
    own_layer[layer.weight_name] = _like(
        weight, np.float64(weight) * _spread(factor, depth, axes, len(layer.weight_shape))
    )
    if "bias" in own_layer:
        bias, places = own_layer["bias"], list(channels)
        axes = [places.index(axis) - len(places) for axis in norm.axes]
        factor, offset_b = (_spread(v, depth, axes, len(places)) for v in (factor, offset))
        own_layer["bias"] = _like(bias, np.float64(bias) * factor + offset_b)
        offset = np.zeros_like(offset)
    variance = np.full_like(offset, norms_lib.identity_variance(norm))
    own_stats["var"] = _like(own_stats["var"], variance)
    own_stats["mean"] = _like(own_stats["mean"], 0 * offset if "bias" in norm_params else -offset)
    if norm_params:
        own_norm = copied(params, norm.path, "batch norms")
        for name, value in (("scale", np.ones_like(offset)), ("bias", offset)):
            if name in norm_params:
                own_norm[name] = _like(own_norm[name], value)
    return {**variables, "params": params, "batch_stats": stats}


def _spread(values: np.ndarray, depth: int, axes: Sequence[int], rank: int) -> np.ndarray:
    """`values` [*stack, one axis each] aligned with a tensor [*stack, *rank axes] at its `axes`."""
    order = np.argsort(axes)
    values = values.transpose(*range(depth), *(depth + order))
    shape = [1] * rank
    for size, axis in zip(values.shape[depth:], np.sort(axes), strict=True):
        shape[axis] = size
    return values.reshape(*values.shape[:depth], *shape)


def _like(old: Array, new: np.ndarray) -> Array:
    return jax.numpy.asarray(new, old.dtype)


def _change(reference: Any, outputs: Any) -> float:
    """Largest difference, relative to the largest magnitude, of any array of the output."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(outputs), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        if not np.isfinite(a).all():
            raise ValueError("fold_batch_norm: the float model's output is not finite")
        # Not a maximum of the two: a NaN must count as a change.
        relative = np.abs(a - b).max(initial=0) / max(np.abs(a).max(initial=0), 1e-30)
        worst = relative if not relative <= worst else worst
    return float(worst) if np.isfinite(worst) else float("inf")
