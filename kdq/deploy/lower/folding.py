"""Batch norms that become part of the layer before them, and biases rounded to int32."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from kdq.deploy.integer_layer import Rounded
from kdq.quantize.calls import ModuleCall, run
from kdq.quantize.inputs import Inputs
from kdq.quantize.layers import LayerInfo
from kdq.quantize.paths import at_path
from kdq.quantize.ptq import norms as norms_lib
from kdq.quantize.ptq.norms import Norm, list_norms
from kdq.quantize.ptq.watch import output_channels
from kdq.types import Array, Variables


def foldable(
    model: nn.Module,
    variables: Variables,
    inputs: Inputs,
    layers: Mapping[str, LayerInfo],
) -> dict[str, Norm]:
    """{layer: the batch norm that is all that its output goes to}."""
    if "batch_stats" not in variables:
        return {}
    norms = {
        norm.source: norm
        for norm in list_norms(model, variables, inputs).values()
        if norm.source in layers and norm.stack == layers[norm.source].stack
    }
    behind = {norm.path for norm in norms.values()}

    def tag(call: ModuleCall) -> Any:
        path = call.path
        if call.method == "__call__" and path in behind:
            return call.argument(0, "x") * 1.0  # one use, whatever a norm does
        outputs = call.run()
        if call.method == "__call__" and path in norms:
            return checkpoint_name(outputs, path)
        return outputs

    def forward(variables: Variables, inputs: Inputs) -> Any:
        return run(model, variables, inputs, tag)[0]

    uses: collections.Counter[str] = collections.Counter()
    _count_uses(jax.make_jaxpr(forward)(variables, inputs).jaxpr, uses)
    return {path: norm for path, norm in norms.items() if uses[path] == 1}


def _count_uses(jaxpr: core.Jaxpr, uses: collections.Counter) -> None:
    """How often each named array is used."""
    names = {
        eqn.outvars[0]: eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "name"
    }
    for eqn in jaxpr.eqns:
        uses.update(names[a] for a in eqn.invars if isinstance(a, core.Var) and a in names)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    _count_uses(inner.jaxpr, uses)
                elif isinstance(inner, core.Jaxpr):
                    _count_uses(inner, uses)
    uses.update(names[a] for a in jaxpr.outvars if isinstance(a, core.Var) and a in names)


def spread(values: np.ndarray, axes: Sequence[int], rank: int) -> np.ndarray:
    """`values`, one axis each for `axes` (negative) of an array of so many, aligned with it."""
    shape = [1] * rank
    values = values.transpose(np.argsort(axes))
    for size, axis in zip(values.shape, sorted(axes), strict=True):
        shape[axis] = size
    return values.reshape(shape)


def of_bias(values: np.ndarray, norm: Norm, layer: LayerInfo, rank: int) -> np.ndarray:
    """Aligns what a norm has of each channel with the bias of the layer before it."""
    places = list(output_channels(layer))
    return spread(values, [places.index(axis) - len(places) for axis in norm.axes], rank)


def rounded_biases(
    variables: Variables,
    layer: LayerInfo,
    norm: Norm | None,
    rounded: Sequence[Rounded | None],
) -> dict[str, Array]:
    """{path: the bias} of a layer, or of the norm behind it, that is what an integer layer adds.

    Args:
      variables: float.
      layer: the integer one.
      norm: the batch norm that is part of it. Where the layer has no bias, the norm's changes.
      rounded: what rounding adds, of each layer of a stack; None of one without a bias.
    """
    biases: dict[str, Array] = {}
    factor = None if norm is None else norms_lib.affine(norm, variables)[0]
    of_norm = {} if norm is None else norms_lib.params_of(norm, variables)
    for place, change in zip(np.ndindex(layer.stack), rounded, strict=False):
        if change is None:
            continue
        if change.index is not None:
            bias = biases.get(layer.path, at_path(variables["params"], layer.path)["bias"])
            added = change.of_bias(bias[place].shape)
            if factor is not None:
                by = np.broadcast_to(of_bias(factor[place], norm, layer, added.ndim), added.shape)
                added = np.divide(added, by, out=np.zeros_like(added), where=by != 0)
            biases[layer.path] = _plus(bias, place, added)
        elif "bias" in of_norm and change.added.size == factor[place].size:
            added = change.added.reshape(factor[place].shape)
            biases[norm.path] = _plus(biases.get(norm.path, of_norm["bias"]), place, added)
    return biases


def _plus(array: Array, place: tuple[int, ...], added: np.ndarray) -> Array:
    """The array with something added to one of its stack."""
    total = np.array(array, np.float64)
    total[place] += added
    return jnp.asarray(total, array.dtype)
