"""SmoothQuant: what is hard to quantize in the activations moves into the weights."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from kdq.quantize.inputs import Inputs
from kdq.quantize.layers import list_layers
from kdq.quantize.network import Network
from kdq.quantize.observe import observe
from kdq.quantize.ptq import matrices
from kdq.quantize.ptq.channels import Rescaling, input_reach, rescale
from kdq.quantize.ptq.options import Progress, ptq_method, quiet
from kdq.quantize.ptq.rescale import find_rescalings
from kdq.types import Array, QParams, Variables


@ptq_method(before_calibration=True)
def smooth(
    network: Network,
    variables: Variables,
    qparams: QParams,
    batches: Sequence[Inputs],
    *,
    alpha: float = 0.5,
    seed: int = 0,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """The same function with activations of even channels (SmoothQuant, arXiv:2211.10438).

    For each channel `j` of a normalization or a layer whose channels can be rescaled,
    `s = max|X_j|^alpha / max|W_j|^(1 - alpha)`, with `X_j` the inputs and `W_j` the weights of all
    layers that take it. What makes the channel is divided by `s`, the weights are multiplied. A
    channel with a maximum of 0 stays. Inputs that nothing can be divided for are logged and stay.

    Args beside those of `options.ptq_method`:
      alpha: 0 to 1; how much of the range moves into the weights.
      seed: of the search for channels; see `find_rescalings`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r}: expected 0 to 1")
    pairs = find_rescalings(network, variables, batches[0], seed=seed, progress=progress)
    layers = {c.layer.path: c.layer for pair in pairs for c in pair.consumers}
    for path, layer in list_layers(network, variables, batches[0]).items():
        if layer.weight_name and path not in layers:
            logging.info("smooth leaves the input of %r: no producer can hold the factors", path)
    watchers, states = {}, {}
    for path, layer in layers.items():
        form = matrices.form(layer)
        watchers[path, "activations"] = matrices.ByChannel(layer, _largest)
        states[path, "activations"] = jnp.zeros((*layer.stack, form.size(form.channels)))
    seen = observe(network, variables, {}, watchers, states, batches)
    inputs = {path: state for (path, _), state in seen.items()}
    matrices.check_finite(inputs, "smooth")
    for pair in pairs:
        factors = _factors(variables, pair, inputs, alpha)
        variables = rescale(variables, pair, 1 / factors)
        for consumer in pair.consumers:  # the next pair may make the same inputs
            path = consumer.layer.path
            inputs[path] = inputs[path] / consumer.inputs(factors)
    return jax.tree.map(jnp.asarray, variables), qparams


def _largest(state: Array, x: Array) -> Array:
    return jnp.maximum(state, jnp.abs(x).max(1))


def _factors(
    variables: Variables, pair: Rescaling, inputs: Mapping[str, Array], alpha: float
) -> np.ndarray:
    """The s of each channel: [producer.factors]."""
    weights = pair.largest([input_reach(variables, consumer) for consumer in pair.consumers])
    reach = pair.largest([inputs[consumer.layer.path] for consumer in pair.consumers])
    used = (weights > 0) & (reach > 0)
    weights, reach = (np.where(used, a, 1.0) for a in (weights, reach))
    return reach**alpha / weights ** (1 - alpha)
