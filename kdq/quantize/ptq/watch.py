"""Seeing what modules return."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from kdq.quantize import kinds, simulate, tracing
from kdq.quantize.inputs import Inputs
from kdq.quantize.layers import LayerInfo, at_path, list_layers, path_of
from kdq.types import Array, QParams, Variables

# What to keep of an output of a module.
Take = Callable[[Array], Any]

TAKEN = "_taken"


def outputs_of(
    model: nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Inputs,
    takes: Mapping[str, Take],
) -> tuple[Any, dict[str, tuple[Any, ...]]]:
    """The model's output, and what `takes` keep of the outputs of layers; to be called in a `jit`.

    Args:
      model: any Linen module.
      variables: its float variables.
      qparams: quantizers that are at work; {} for the float model.
      inputs: one batch.
      takes: what to keep, by layer path.

    Returns:
      `(output, {path: (what was kept of the first call, of the second, ...)})`; of a stack of
      layers with its axes in front, and of a loop over one set of weights with all turns in one.
    """
    layers = list_layers(model, variables, inputs)  # traced once for a shape
    depths = {path: len(layers[path].stack) for path in takes if layers[path].in_loop}

    def watch(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        outputs = next_fun(*args, **kwargs)
        module, path = context.module, path_of(context.module)
        kind = kinds.kind_of(module)
        if path not in takes or kind is None or context.method_name not in kind.methods:
            return outputs
        if path in depths:  # see `observe`
            return tracing.see(path, outputs)
        before = module.get_variable("params", TAKEN) if _has(module, TAKEN) else ()
        module.put_variable("params", TAKEN, (*before, takes[path](outputs)))
        return outputs

    # Under "params", the collection that lifted transforms slice and stack: see `observe`.
    forward = lambda variables, inputs: simulate.run(
        model, variables, qparams, inputs, watch, mutable=["params"]
    )
    if depths:
        (outputs, changed), collected = tracing.collect(forward, variables, inputs)
    else:
        (outputs, changed), collected = forward(variables, inputs), {}
    taken = {}
    for path, take in takes.items():
        if path not in depths:
            taken[path] = at_path(changed["params"], path)[TAKEN]
            continue
        for _ in range(depths[path]):
            take = jax.vmap(take)
        taken[path] = tuple(map(take, collected.get(path, ())))
    return outputs, taken


def _has(module: nn.Module, name: str) -> bool:
    return module.has_variable("params", name)


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
