"""Calibration: a few unlabelled batches in, the quantizers of every layer out."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq.quantize import grid
from kdq.quantize.inputs import Batch, as_batches, unboxed
from kdq.quantize.layers import LayerInfo, list_layers, list_unquantized
from kdq.quantize.network import Network, as_network
from kdq.quantize.observe import Key, observe
from kdq.quantize.observers import MinMax, Observer, State
from kdq.quantize.paths import at_path
from kdq.quantize.rules import (
    QuantizationRule,
    TensorSpec,
    activation_scale_shape,
    match,
    weight_scale_shape,
)
from kdq.quantize.sqnr import warn_of_noise
from kdq.types import Array, QParams, Variables


def calibrate(
    network: Network | nn.Module,
    variables: Variables,
    rules: Sequence[QuantizationRule],
    batches: Iterable[Batch],
    *,
    check: bool = True,
) -> QParams:
    """The quantizers of every layer that a rule matches, from the float model's own ranges.

    A log line warns if the quantized model's output, or a layer's, is mostly noise (`sqnr`).

    Args:
      network: any Linen module, or a `Network`.
      variables: its float variables.
      rules: first match wins; see `kdq.quantize.rules`.
      batches: inputs of the model, all of one shape: another shape compiles anew. Each is an array,
        a tuple of positional arguments, a dict or another pytree that is one argument, or `Inputs`,
        with keyword arguments of its own; `masked` ones have examples or positions of padding.
      check: runs the float and the quantized model on the first batch once more, to warn of noise.

    Returns:
      `{path: {"weights": quantizer, "activations": quantizer}}` in layer order; a part that a rule
      leaves in float is absent. A product of activations has "activations" and "other".

    Raises:
      ValueError: no batches, an empty one, a rule that fits no layer, or values that are not
        finite; names the layer.
    """
    network, variables = as_network(network), unboxed(variables)
    batches = as_batches(batches, "calibrate")
    first = next(batches)
    layers = list_layers(network, variables, first)
    matched = match(rules, layers, list_unquantized(network, variables, first))
    specs = {
        (path, operand): rule.activations
        for path, rule in matched.items()
        if rule.activations is not None
        for operand in layers[path].operands
    }
    states = _observe_inputs(network, variables, specs, layers, itertools.chain([first], batches))
    qparams = {}
    for path, rule in matched.items():
        quantizers = {}
        if rule.weights is not None and layers[path].weight_name:
            weight = at_path(variables["params"], path)[layers[path].weight_name]
            quantizers["weights"] = weight_quantizer(weight, rule.weights, layers[path])
        for operand in layers[path].operands:
            if (path, operand) in states:
                quantizers[operand] = input_quantizer(
                    states[path, operand], rule.activations, layers[path], operand
                )
        if quantizers:
            qparams[path] = quantizers
    if check:
        warn_of_noise(network, variables, qparams, first)
    return qparams


def weight_quantizer(weight: Array, spec: TensorSpec, layer: LayerInfo) -> grid.Quantizer:
    """The quantizer of one weight, or of a stack of them.

    `weight` is [*stack, *layer.weight_shape] float. Raises ValueError, with the layer, for values
    that are not finite.
    """
    shape = weight_scale_shape(spec, layer)
    state = spec.observer.exact(grid.to_groups(weight, (*layer.stack, *shape)))
    where = f"the weight of layer {layer.path!r}"
    return _quantizer(state, spec, layer.stack, shape, True, where)


def input_quantizer(
    state: State, spec: TensorSpec, layer: LayerInfo, operand: str
) -> grid.Quantizer:
    """The quantizer of one input of a layer, from what an observer saw of it."""
    shape = activation_scale_shape(spec, layer, operand)
    state = jax.tree.map(lambda s: s.reshape(-1, *s.shape[len(layer.stack) + 1 :]), state)
    where = f"the input of layer {layer.path!r}"
    quantizer = _quantizer(state, spec, layer.stack, shape, False, where)
    if spec.dynamic:
        # What is left of the observation is the sign; the rest is computed from each tensor.
        how = grid.Dynamic(
            granularity=spec.granularity, group_size=spec.group_size, symmetric=spec.symmetric
        )
        quantizer = quantizer.replace(scale=jnp.ones_like(quantizer.scale), dynamic=how)
    return quantizer


def _quantizer(
    state: State,
    spec: TensorSpec,
    stack: tuple[int, ...],
    shape: tuple[int, ...],
    is_weight: bool,
    where: str,
) -> grid.Quantizer:
    """The quantizer, with scales of `(*stack, *shape)`, of what an observer saw of each."""
    lowest, highest = (np.asarray(bound) for bound in state.bounds())
    if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
        raise ValueError(f"calibration met NaN or infinity in {where}")
    signed = spec.signed
    if signed is None:  # affine codes start at 0: their offset does the rest
        signed = spec.symmetric and (is_weight or bool((lowest < 0).any()))
    options = {"symmetric": spec.symmetric, "signed": signed, "narrow": spec.narrow and signed}
    if spec.format:
        options = {"format": spec.format}
    low, high = _observer(spec).range(state, bits=spec.width, **options)
    quantizer = grid.from_range(low, high, spec.width, **options)
    per_layer = {k: getattr(quantizer, k) for k in ("qmin", "qmax", "levels")}
    return quantizer.replace(
        **{k: getattr(quantizer, k).reshape(*stack, *shape) for k in ("scale", "zero_point")},
        **{
            k: None if v is None else jnp.broadcast_to(v, (*stack, *v.shape))
            for k, v in per_layer.items()
        },
    )


def _observer(spec: TensorSpec) -> Observer:
    """The observer of a tensor; for a dynamic input only the sign matters."""
    return MinMax() if spec.dynamic else spec.observer


@dataclasses.dataclass(frozen=True)
class _Observe:
    """An observer's update, for the input of a layer."""

    observer: Observer
    shape: tuple[int, ...]  # of the scale

    def __call__(self, state: State, x: Array, counts: Array | None = None) -> State:
        if counts is not None:
            counts = grid.to_groups(jnp.broadcast_to(counts, x.shape), self.shape)
        return self.observer.update(state, grid.to_groups(x, self.shape), counts)


def _observe_inputs(
    network: Network,
    variables: Variables,
    specs: dict[Key, TensorSpec],
    layers: dict[str, LayerInfo],
    batches: Iterable[Batch],
) -> dict[Key, State]:
    """The states of the observers of layers' inputs: [*stack, groups, ...]."""
    watchers, states = {}, {}
    for (path, operand), spec in specs.items():
        layer = layers[path]
        shape = activation_scale_shape(spec, layer, operand)
        observer = _observer(spec)
        watchers[path, operand] = _Observe(observer, shape)
        empty = observer.init(math.prod(shape))
        broadcast = lambda s, stack=layer.stack: jnp.broadcast_to(s, (*stack, *s.shape))
        states[path, operand] = jax.tree.map(broadcast, empty)
    return observe(network, variables, {}, watchers, states, batches)
