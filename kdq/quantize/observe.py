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

from kdq.quantize import kinds, simulate, tracing
from kdq.quantize.inputs import Batch, Inputs, as_batches, unboxed
from kdq.quantize.layers import at_path, list_layers, path_of
from kdq.types import Array, QParams, Variables

STATES = "_observed"

# (state, input of the layer) -> state; hashable, and equal if it does the same: it is static.
Watcher = Callable[[Any, Array], Any]
Key = tuple[str, str]  # layer path, operand


def observe(
    model: nn.Module,
    variables: Variables,
    qparams: QParams,
    watchers: Mapping[Key, Watcher],
    states: Mapping[Key, Any],
    batches: Iterable[Batch],
    **apply_kwargs: Any,
) -> dict[Key, Any]:
    """The states after every layer's watcher saw all of its inputs.

    Args:
      model: any Linen module.
      variables: its float variables.
      qparams: quantizers that are at work while it runs; {} for the float model.
      watchers: what to do with an input, by layer and operand.
      states: where each starts: pytrees of arrays, with the axes of its layer's stack in front.
      batches: inputs of the model, all of one shape: another compiles anew.
      **apply_kwargs: passed to the model, e.g. `train=False`.
    """
    states = dict(states)
    if not states:
        return states
    variables = unboxed(variables)
    for inputs in as_batches(batches, "observe", apply_kwargs):
        layers = list_layers(model, variables, inputs)  # traced once for a shape
        in_loop = {path: len(layers[path].stack) for path, _ in states if layers[path].in_loop}
        states = _observe(
            variables,
            qparams,
            states,
            inputs,
            model=model,
            watchers=tuple(watchers.items()),
            in_loop=tuple(in_loop.items()),
        )
    return states


@partial(jax.jit, static_argnames=("model", "watchers", "in_loop"))
def _observe(variables, qparams, states, inputs, *, model, watchers, in_loop):
    """One batch; compiled once for all bit-widths, which watchers do not know."""
    by_layer, depths, watchers = {}, dict(in_loop), dict(watchers)
    for (path, operand), state in states.items():
        by_layer.setdefault(path, {})[operand] = state
    params = dict(variables["params"])
    for path, layer_states in by_layer.items():
        if path not in depths:
            simulate.copied(params, path, "watchers")[STATES] = layer_states

    def watch(next_fun, args, kwargs, context):
        module, path = context.module, path_of(context.module)
        for name, place in kinds.operands(module, context.method_name).items():
            if (path, name) not in watchers:
                continue
            x = kinds.argument(args, kwargs, place)
            if path in depths:
                x = tracing.see((path, name), x)
                args, kwargs = kinds.replace_argument(args, kwargs, place, x)
            else:
                if not module.has_variable("params", STATES):
                    continue  # a layer that a watcher runs for itself, where the model is a layer
                seen = dict(module.get_variable("params", STATES))
                seen[name] = watchers[path, name](seen[name], x)
                module.put_variable("params", STATES, seen)
        return next_fun(*args, **kwargs)

    def forward(variables: Variables, inputs: Inputs) -> Any:
        return simulate.run(model, variables, qparams, inputs, watch, mutable=["params"])

    variables = {**variables, "params": params}
    if depths:
        (_, changed), collected = tracing.collect(forward, variables, inputs)
    else:
        (_, changed), collected = forward(variables, inputs), {}
    after = {}
    for (path, name), state in states.items():
        if path not in depths:
            after[path, name] = at_path(changed["params"], path)[STATES][name]
            continue
        update = watchers[path, name]
        for _ in range(depths[path]):
            update = jax.vmap(update)
        for x in collected[path, name]:
            state = update(state, x)
        after[path, name] = state
    return after
