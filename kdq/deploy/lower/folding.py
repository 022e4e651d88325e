"""Batch norms that become part of the layer before them, and biases rounded to int32."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from kdq.deploy.integer_layer import Rounded
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Inputs
from kdq.quantize.layers import LayerInfo
from kdq.quantize.network import Network, Weights
from kdq.quantize.paths import at_path
from kdq.quantize.ptq import norms as norms_lib
from kdq.quantize.ptq.norms import Norm, list_norms
from kdq.quantize.ptq.watch import output_channels
from kdq.types import Array, Variables


def list_foldable(
    network: Network, variables: Variables, inputs: Inputs, layers: Mapping[str, LayerInfo]
) -> dict[str, Norm]:
    """Returns the batch norm of each layer whose output goes to that norm alone."""
    if "batch_stats" not in variables:
        return {}
    norms = {
        norm.source: norm
        for norm in list_norms(network, variables, inputs).values()
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
        return network.run(Weights(variables=variables, qparams={}), inputs, tag)[0]

    uses: collections.Counter[str] = collections.Counter()
    _count_uses(jax.make_jaxpr(forward)(variables, inputs).jaxpr, uses)
    return {path: norm for path, norm in norms.items() if uses[path] == 1}


def _count_uses(jaxpr: core.Jaxpr, uses: collections.Counter) -> None:
    """Counts how often each named array is used."""
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


def broadcast_to_axes(values: np.ndarray, axes: Sequence[int], rank: int) -> np.ndarray:
    """Aligns values, one axis each for `axes` (negative), with an array of so many axes."""
    shape = [1] * rank
    values = values.transpose(np.argsort(axes))
    for size, axis in zip(values.shape, sorted(axes), strict=True):
        shape[axis] = size
    return values.reshape(shape)


def align_with_bias(values: np.ndarray, norm: Norm, layer: LayerInfo, rank: int) -> np.ndarray:
    """Aligns numbers of a norm's channels with the bias of the layer before it."""
    places = list(output_channels(layer))
    axes = [places.index(axis) - len(places) for axis in norm.axes]
    return broadcast_to_axes(values, axes, rank)


def rounded_biases(
    variables: Variables,
    layer: LayerInfo,
    norm: Norm | None,
    rounded: Sequence[Rounded | None],
) -> dict[str, Array]:
    """Returns the bias, by path, that an integer layer adds: its own, or else that of its norm.

    `rounded` has the change by rounding for each layer of a stack; None for one without a bias.
    """
    biases: dict[str, Array] = {}
    factor = None if norm is None else norms_lib.affine(norm, variables)[0]
    norm_params = {} if norm is None else norms_lib.params_of(norm, variables)
    for place, change in zip(np.ndindex(layer.stack), rounded, strict=False):
        if change is None:
            continue
        if change.index is not None:
            bias = biases.get(layer.path, at_path(variables["params"], layer.path)["bias"])
            added = change.sum_up(bias[place].shape)
            if factor is not None:
                by = np.broadcast_to(
                    align_with_bias(factor[place], norm, layer, added.ndim), added.shape
                )
                added = np.divide(added, by, out=np.zeros_like(added), where=by != 0)
            biases[layer.path] = _add_at(bias, place, added)
        elif "bias" in norm_params and change.added.size == factor[place].size:
            added = change.added.reshape(factor[place].shape)
            biases[norm.path] = _add_at(biases.get(norm.path, norm_params["bias"]), place, added)
    return biases


def _add_at(array: Array, place: tuple[int, ...], added: np.ndarray) -> Array:
    """Returns a stack of arrays with something added to one of them."""
    total = np.array(array, np.float64)
    total[place] += added
    return jnp.asarray(total, array.dtype)
