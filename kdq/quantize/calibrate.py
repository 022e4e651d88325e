"""Calibration: a few unlabelled batches in, the quantizers of every layer out."""

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq.quantize import grid
from kdq.quantize.layers import LayerInfo, as_args, at_path, list_layers, path_of
from kdq.quantize.observers import State
from kdq.quantize.rules import (
    QuantizationRule,
    TensorSpec,
    activation_scale_shape,
    match,
    weight_scale_shape,
)
from kdq.types import Array, QParams, Variables


def calibrate(
    model: nn.Module,
    variables: Variables,
    rules: Sequence[QuantizationRule],
    batches: Iterable[Array | tuple],
    **apply_kwargs: Any,
) -> QParams:
    """The quantizers of every layer that a rule matches, from the float model's own ranges.

    Args:
      model: any Linen module.
      variables: its float variables.
      rules: first match wins; see `kdq.quantize.rules`.
      batches: inputs of the model (arrays, or tuples of arguments), all of one shape: another shape
        compiles anew.
      **apply_kwargs: passed to the model, e.g. `train=False`.

    Returns:
      `{path: {"weights": quantizer, "activations": quantizer}}` in layer order; the half that a
      rule leaves in float is absent.

    Raises:
      ValueError: no batches, a rule that fits no layer, or values that are not finite; names the
        layer.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("calibration got no batches: want at least one")
    layers = list_layers(model, variables, first, **apply_kwargs)
    matched = match(rules, layers)
    specs = {p: r.activations for p, r in matched.items() if r.activations is not None}
    batches = itertools.chain([first], batches)
    states = _observe_inputs(model, variables, specs, layers, batches, apply_kwargs)
    qparams = {}
    for path, rule in matched.items():
        quantizers = {}
        if rule.weights is not None:
            weight = at_path(variables["params"], path)[layers[path].weight_name]
            quantizers["weights"] = weight_quantizer(weight, rule.weights, layers[path])
        if rule.activations is not None:
            shape = activation_scale_shape(rule.activations, layers[path])
            where = f"the input of layer {path!r}"
            quantizers["activations"] = _quantizer(
                states[path], rule.activations, shape, False, where
            )
        if quantizers:
            qparams[path] = quantizers
    return qparams


def weight_quantizer(weight: Array, spec: TensorSpec, layer: LayerInfo) -> grid.Quantizer:
    """The quantizer of one weight."""
    shape = weight_scale_shape(spec, layer)
    state = spec.observer.exact(grid.to_groups(weight, shape))
    return _quantizer(state, spec, shape, True, f"the weight of layer {layer.path!r}")


def _quantizer(
    state: State, spec: TensorSpec, shape: tuple[int, ...], is_weight: bool, where: str
) -> grid.Quantizer:
    """The quantizer, with scales of `shape`, of what an observer saw."""
    lowest, highest = (np.asarray(bound) for bound in state.bounds())
    if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
        raise ValueError(f"calibration met NaN or infinity in {where}")
    signed = spec.signed
    if signed is None:  # affine codes start at 0: their offset does the rest
        signed = spec.symmetric and (is_weight or bool((lowest < 0).any()))
    options = {"symmetric": spec.symmetric, "signed": signed, "narrow": spec.narrow and signed}
    low, high = spec.observer.range(state, bits=spec.bits, **options)
    quantizer = grid.from_range(low, high, spec.bits, **options)
    return quantizer | {k: quantizer[k].reshape(shape) for k in ("scale", "zero_point")}


def _observe_inputs(
    model: nn.Module,
    variables: Variables,
    specs: dict[str, TensorSpec],
    layers: dict[str, LayerInfo],
    batches: Iterable[Array | tuple],
    apply_kwargs: dict[str, Any],
) -> dict[str, State]:
    """What each layer's observer saw of its inputs."""
    if not specs:
        return {}
    shapes = {path: activation_scale_shape(spec, layers[path]) for path, spec in specs.items()}
    states = {path: spec.observer.init(math.prod(shapes[path])) for path, spec in specs.items()}
    observers = tuple((path, spec.observer, shapes[path]) for path, spec in specs.items())
    for inputs in batches:
        states = _observe(
            variables,
            states,
            inputs,
            model=model,
            observers=observers,
            apply_kwargs=tuple(sorted(apply_kwargs.items())),
        )
    return states


@partial(jax.jit, static_argnames=("model", "observers", "apply_kwargs"))
def _observe(variables, states, inputs, *, model, observers, apply_kwargs):
    """One batch; compiled once for all bit-widths, which the observers do not know."""
    states = dict(states)
    observers = {path: (observer, shape) for path, observer, shape in observers}

    def watch(next_fun, args, kwargs, context):
        path = path_of(context.module)
        if context.method_name == "__call__" and path in observers:
            observer, shape = observers[path]
            states[path] = observer.update(states[path], grid.to_groups(args[0], shape))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        model.apply(variables, *as_args(inputs), **dict(apply_kwargs))
    return states
