"""Looking at what layers get while a model runs, through Linen's lifted transforms as well.

What is seen travels in the "params" collection at the layer's own path, as the quantizers do (see
`simulate`): under `nn.scan` each layer of the stack then has its own, under `nn.remat` nothing
escapes. In a loop over one set of weights (`nn.RNN`, or `nn.scan` and `nn.vmap` that broadcast
"params") that collection can't change: there all that a layer gets is collected, over all turns,
and seen at once after the model ran.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdq.quantize import tracing
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Batch, as_batches, unboxed
from kdq.quantize.layers import list_layers
from kdq.quantize.masks import counted_in_call, counted_turns
from kdq.quantize.network import Network, Weights, as_network
from kdq.quantize.walk import walk
from kdq.types import Array, QParams, Variables

# (state, input of the layer with 0 for padding, which of it counts: see `masks`) -> state;
# hashable, and equal if it does the same: it is static.
Watcher = Callable[[Any, Array, Array | None], Any]
Key = tuple[str, str]  # layer path, operand


def observe(
    network: Network | nn.Module,
    variables: Variables,
    qparams: QParams,
    watchers: Mapping[Key, Watcher],
    states: Mapping[Key, Any],
    batches: Iterable[Batch],
) -> dict[Key, Any]:
    """Returns the states after every layer's watcher saw all of its inputs.

    Args:
      network: any Linen module, or a `Network`.
      variables: its float variables.
      qparams: quantizers that are at work while it runs; {} for the float model.
      watchers: what to do with an input, by layer and operand.
      states: where each starts: pytrees of arrays, with the axes of its layer's stack in front.
      batches: inputs of the model, all of one shape: another compiles anew.
    """
    states, network = dict(states), as_network(network)
    if not states:
        return states
    weights = Weights(variables=unboxed(variables), qparams=qparams)
    for inputs in as_batches(batches, "observe"):
        layers = list_layers(network, weights.variables, inputs)  # traced once for a shape
        in_loop = {path: len(layers[path].stack) for path, _ in states if layers[path].in_loop}
        states = _observe(
            weights,
            states,
            inputs,
            network=network,
            watchers=tuple(watchers.items()),
            in_loop=tuple(in_loop.items()),
        )
    return states


@partial(jax.jit, static_argnames=("network", "watchers", "in_loop"))
def _observe(weights, states, inputs, *, network, watchers, in_loop):
    """One batch; compiled once for all bit-widths, which watchers do not know."""
    by_layer, depths, watchers = {}, dict(in_loop), dict(watchers)
    for (path, operand), state in states.items():
        if path not in depths:
            by_layer.setdefault(path, {})[operand] = state

    def watch(call: ModuleCall, seen: Any) -> tuple[Any, Any]:
        path = call.path
        for name, x in call.operands.items():
            if (path, name) not in watchers:
                continue
            if path in depths:
                call = call.with_operands(**{name: tracing.see((path, name), x)})
            elif seen is not None:  # else a watcher runs the layer, where the model is a layer
                counts = counted_in_call(inputs.mask, call, x, name)
                x = x if counts is None else jnp.where(counts, x, 0)
                seen = seen | {name: watchers[path, name](seen[name], x, counts)}
        return call.run(), seen

    _, left = walk(network, weights, inputs, watch, by_layer, collects=bool(depths))
    after = {}
    for (path, name), state in states.items():
        if path not in depths:
            after[path, name] = left[path][name]
            continue
        update = partial(_update_turns, watchers[path, name], inputs.mask)
        for _ in range(depths[path]):
            update = jax.vmap(update)
        for x in left[path, name]:
            state = update(state, x)
        after[path, name] = state
    return after


def _update_turns(watcher: Watcher, mask: Array | None, state: Any, x: Array) -> Any:
    """The state after all turns of a loop, `x` [turns, batch, ...]; a turn may be a position."""
    counts = counted_turns(mask, x)
    return watcher(state, x if counts is None else jnp.where(counts, x, 0), counts)
