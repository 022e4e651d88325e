"""Looking at what layers get while a model runs, through Linen's lifted transforms as well.

What is seen travels in the "params" collection at the layer's own path, as the quantizers do (see
`simulate`): under `nn.scan` each layer of the stack then has its own, under `nn.remat` nothing
escapes.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from kdq.quantize import kinds, simulate
from kdq.quantize.layers import at_path, path_of
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
    batches: Iterable[Array | tuple],
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
    static = tuple(sorted(apply_kwargs.items()))
    states = dict(states)
    if not states:
        return states
    for inputs in batches:
        states = _observe(
            variables,
            qparams,
            states,
            inputs,
            model=model,
            watchers=tuple(watchers.items()),
            apply_kwargs=static,
        )
    return states


@partial(jax.jit, static_argnames=("model", "watchers", "apply_kwargs"))
def _observe(variables, qparams, states, inputs, *, model, watchers, apply_kwargs):
    """One batch; compiled once for all bit-widths, which watchers do not know."""
    by_layer = {}
    for (path, operand), state in states.items():
        by_layer.setdefault(path, {})[operand] = state
    params = dict(variables["params"])
    for path, own in by_layer.items():
        simulate.copied(params, path, "watchers")[STATES] = own
    watchers = dict(watchers)

    def watch(next_fun, args, kwargs, context):
        module, path = context.module, path_of(context.module)
        operands = kinds.operands(module, context.method_name)
        if operands and module.has_variable("params", STATES):
            own = dict(module.get_variable("params", STATES))
            for name in own.keys() & operands.keys():
                x = kinds.argument(args, kwargs, operands[name])
                own[name] = watchers[path, name](own[name], x)
            module.put_variable("params", STATES, own)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(kinds.name_products), nn.intercept_methods(watch):
        _, changed = simulate.apply(
            model,
            {**variables, "params": params},
            qparams,
            inputs,
            mutable=["params"],
            **dict(apply_kwargs),
        )
    return {(path, name): at_path(changed["params"], path)[STATES][name] for path, name in states}
