"""AWQ: weights that meet large activations get finer steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from kdq.quantize.calibrate import weight_quantizer
from kdq.quantize.inputs import Inputs
from kdq.quantize.layers import LayerInfo, list_layers
from kdq.quantize.network import Network
from kdq.quantize.observe import observe
from kdq.quantize.ptq import matrices
from kdq.quantize.ptq.channels import Consumer, Rescaling, rescale
from kdq.quantize.ptq.options import Progress, check_positive, ptq_method, quiet
from kdq.quantize.ptq.rescale import find_rescalings
from kdq.quantize.rules import QuantizationRule, TensorSpec, match, uniform_rules
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables

FOUR_BITS = uniform_rules(4, None)


@ptq_method(before_calibration=True)
def awq(
    network: Network,
    variables: Variables,
    qparams: QParams,
    batches: Sequence[Inputs],
    *,
    rules: Sequence[QuantizationRule] = FOUR_BITS,
    candidates: int = 20,
    seed: int = 0,
    progress: Progress = quiet,
) -> tuple[Variables, QParams]:
    """The same function with weights that quantize better where it matters (arXiv:2306.00978).

    For each set of layers that take the channels of one producer, `s = mean|X_j|^a`, divided by
    sqrt(max(s) min(s)); the producer is divided by `s`, the weights are multiplied. Where several
    inputs are one channel (flattened pixels), the largest mean counts. `a` is the best of 0,
    1/candidates, ..., 1 - 1/candidates by the error of these layers' outputs,
    `Σ |X W - (X / s) Q(W s)|²`, with weights quantized as `rules` say: on the batches never worse
    than that of no factor at all, `a = 0`. Layers without a producer that can hold the factor, and
    channels that are always 0, stay; the former are logged.

    The layers' Gram matrices are kept all at once: 4 · inputs² bytes for each group of each.

    Args beside those of `options.ptq_method`:
      rules: how the weights will be quantized; those for `calibrate`.
      candidates: values of `a`.
      seed: of the search for channels; see `find_rescalings`.

    Raises:
      ValueError: a rule that fits no layer, or groups that do not divide; names the layer.
    """
    check_positive("awq", candidates=candidates)
    all_layers = list_layers(network, variables, batches[0])
    specs = {path: rule.weights for path, rule in match(rules, all_layers).items() if rule.weights}
    rescalings = find_rescalings(network, variables, batches[0], seed=seed, progress=progress)
    takes = lambda pair: any(c.layer.path in specs for c in pair.consumers)
    pairs = {pair.producer.path: pair for pair in rescalings if takes(pair)}
    layers = {c.layer.path: c.layer for pair in pairs.values() for c in pair.consumers}
    for path in specs:
        if all_layers[path].weight_name and path not in layers:
            logging.info("awq leaves layer %r: no producer can hold the factors", path)
    seen = _observe(network, variables, layers, batches)
    for path in progress(list(pairs), "awq"):
        pair = pairs[path]
        power, factors = _best(variables, pair, seen, specs, candidates)
        logging.info("awq: %r to the power of %.2f", path, power)
        variables = rescale(variables, pair, 1 / factors)
        for consumer in pair.consumers:  # the next pair may make the same inputs
            seen[consumer.layer.path] = _divided(seen[consumer.layer.path], consumer, factors)
    return jax.tree.map(jnp.asarray, variables), qparams


def _observe(network, variables, layers, batches) -> dict[str, tuple[Array, Array]]:
    """The mean |x| of each layer's inputs by channel, and their Gram matrices."""
    watchers, states = {}, {}
    for path, layer in layers.items():
        form = matrices.form(layer)
        watchers[path, "activations"] = _Watch(layer)
        sums = jnp.zeros((*layer.stack, form.size(form.channels)))
        count = jnp.zeros(layer.stack)
        states[path, "activations"] = (sums, count, matrices.empty_gram(layer))
    seen = observe(network, variables, {}, watchers, states, batches)
    means = {p: (sums / count[..., None], gram) for (p, _), (sums, count, gram) in seen.items()}
    matrices.check_finite({path: mean for path, (mean, _) in means.items()}, "awq")
    return means


@dataclasses.dataclass(frozen=True)
class _Watch:
    """A watcher: Σ|x| by channel, the number of its samples, and Σ p pᵀ."""

    layer: LayerInfo

    def __call__(self, state: tuple[Array, Array, Array], x: Array, counts: Array | None) -> Any:
        sums, count, gram = state
        rows = jnp.abs(matrices.by_channel(x, matrices.form(self.layer)).astype(jnp.float32))
        samples = rows.shape[1]
        if counts is not None:  # rows of padding are 0
            samples = jnp.broadcast_to(counts, x.shape).sum() / rows.shape[0]
        return sums + rows.sum(1), count + samples, gram + matrices.gram(self.layer, x)


def _best(
    variables: Variables,
    pair: Rescaling,
    seen: Mapping[str, tuple[Array, Array]],
    specs: Mapping[str, TensorSpec],
    candidates: int,
) -> tuple[float, np.ndarray]:
    """The power with the smallest error, and its factors: [producer.factors]."""
    means = pair.largest([seen[consumer.layer.path][0] for consumer in pair.consumers])
    quantized = [consumer for consumer in pair.consumers if consumer.layer.path in specs]
    live = means > 0
    best = (np.inf, 0.0, np.ones_like(means))
    for power in np.arange(candidates) / candidates if live.any() else ():
        # A channel that is hardly used is not scaled down without end.
        factors = np.maximum((means / means.max()) ** power, 1e-4)
        factors /= np.sqrt(factors[live].max() * factors[live].min())
        factors = np.where(live, factors, 1.0)
        error = 0.0
        for consumer in quantized:
            path = consumer.layer.path
            error += _error(variables, consumer, seen[path][1], factors, specs[path])
        if error < best[0]:
            best = (error, float(power), factors)
    return best[1:]


def _error(
    variables: Variables, consumer: Consumer, gram: Array, factors: np.ndarray, spec: TensorSpec
) -> float:
    """Σ |X W - (X / s) Q(W s)|² over the batches, from Σ p pᵀ."""
    layer = consumer.layer
    form = matrices.form(layer)
    inputs = consumer.inputs(factors)
    weight = matrices.weight_of(variables, layer)
    scale = lambda w, f: matrices.scaled(w, form, form.channels, f)
    multiplied = matrices.over_stack(scale, layer.stack)(weight, inputs)
    quantizer = weight_quantizer(multiplied, spec, layer)
    error = lambda *arrays: _output_error(*arrays, form)
    return float(matrices.over_stack(error, layer.stack)(gram, weight, quantizer, inputs).sum())


@partial(jax.jit, static_argnames=("form",))
def _output_error(gram, weight, quantizer, inputs, form):
    """Σ over groups and outputs of δᵀ G δ, with δ the change of a column of the matrix."""
    scale = lambda w, f: matrices.scaled(w, form, form.channels, f)
    rounded = scale(fake_quantize(scale(weight, inputs), quantizer), 1 / inputs)
    change = matrices.to_matrix((weight - rounded).astype(jnp.float32), form)
    return jnp.einsum("gio,gij,gjo->", change, gram, change)


def _divided(
    seen: tuple[Array, Array], consumer: Consumer, factors: np.ndarray
) -> tuple[Array, Array]:
    """The means and Gram matrices of inputs, as if they were divided by `factors`."""
    form = matrices.form(consumer.layer)
    inputs = consumer.inputs(factors)

    def rows(inputs):
        whole = jnp.broadcast_to(matrices.along(inputs, form, form.channels), form.split)
        return matrices.to_matrix(whole, form)[..., 0]

    rows = matrices.over_stack(rows, consumer.layer.stack)(inputs)
    return seen[0] / inputs, seen[1] / (rows[..., :, None] * rows[..., None, :])
