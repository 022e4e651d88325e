"""Seeing what layers return."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kdq.quantize import tracing
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Inputs
from kdq.quantize.layers import LayerInfo, list_layers
from kdq.quantize.masks import counted_in_call, counted_turns
from kdq.quantize.network import Network, Weights
from kdq.quantize.walk import walk
from kdq.types import Array

# What to keep of an output of a layer; of the second argument, see `masks`.
Take = Callable[[Array, Array | None], Any]


def outputs_of(
    network: Network, weights: Weights, inputs: Inputs, takes: Mapping[str, Take]
) -> tuple[Any, dict[str, tuple[Any, ...]]]:
    """The model's output, and what `takes` keep of the outputs of layers; to be called in a `jit`.

    `takes` say what to keep by layer path; variables are unboxed. Returns `(output, {path: (what
    was kept of the first call, of the second, ...)})`; of a stack of layers with its axes in front,
    of a loop over one set of weights with all turns in one.
    """
    layers = list_layers(network, weights.variables, inputs)  # traced once for a shape
    depths = {path: len(layers[path].stack) for path in takes if layers[path].in_loop}

    def watch(call: ModuleCall, taken: Any) -> tuple[Any, Any]:
        outputs, path = call.run(), call.path
        if path not in takes or call.kind is None:
            return outputs, taken
        if path in depths:  # see `observe`
            return tracing.see(path, outputs), taken
        counts = counted_in_call(inputs.mask, call, outputs, "")
        return outputs, (*taken, takes[path](outputs, counts))

    extras = {path: () for path in takes if path not in depths}
    outputs, left = walk(network, weights, inputs, watch, extras, collects=bool(depths))
    for path, depth in depths.items():
        take = lambda x, take=takes[path]: take(x, counted_turns(inputs.mask, x))
        for _ in range(depth):
            take = jax.vmap(take)
        left[path] = tuple(map(take, left.get(path, ())))
    return outputs, left


def output_channels(layer: LayerInfo) -> dict[int, int]:
    """{axis of a layer's output: the axis of its weight that makes it}, both negative, ascending.

    A bias has these axes in this order. Empty for a layer without output channels of its own
    (Embed, a product), and an Einsum whose equation is given with the call.
    """
    rank, weight_rank = len(layer.output_shape), len(layer.weight_shape)
    if layer.kind in ("Dense", "Conv", "ConvTranspose"):
        return {-1: layer.channel_axes[0]}
    if layer.kind == "DenseGeneral":
        batch = _size(layer.module.batch_dims)
        features = _size(layer.module.features)
        leading = {i - rank: i - weight_rank for i in range(batch)}
        return leading | {-i: -i for i in range(features, 0, -1)}
    if layer.kind == "Einsum" and layer.module.einsum_str is not None:
        terms, output = layer.module.einsum_str.replace(" ", "").split("->")
        kernel = terms.split(",")[1]
        before, _, after = output.partition("...")
        axes = {label: i - rank for i, label in enumerate(before)}
        axes |= {label: i - len(after) for i, label in enumerate(after)}
        return {axes[k]: kernel.index(k) - weight_rank for k in output if k in kernel and k != "."}
    return {}


def _size(dimensions: int | Sequence[int]) -> int:
    return len(dimensions) if isinstance(dimensions, Sequence) else 1
