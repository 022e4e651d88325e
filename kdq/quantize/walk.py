"""The walk over a network's layers: a handler sees each call, and the extras of its module.

Extras are pytrees that travel beside a module's parameters: states of observers, outputs to keep.
"""

from collections.abc import Callable, Mapping
from typing import Any

from kdq.quantize import tracing
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Batch, as_inputs
from kdq.quantize.network import Network, Weights
from kdq.quantize.paths import at_path, copied
from kdq.types import Variables

EXTRAS = "_extras"

# (a call, the extras of its module or None) -> (outputs, the extras afterwards). To return the very
# extras that it got is to leave them alone.
Handler = Callable[[ModuleCall, Any], tuple[Any, Any]]


def walk(
    network: Network,
    weights: Weights,
    inputs: Batch,
    handler: Handler,
    extras: Mapping[str, Any] | None = None,
    *,
    collection: str = "params",
    read_only: bool = False,
    collects: bool = False,
) -> tuple[Any, dict[Any, Any]]:
    """Runs a network in evaluation mode with a handler around every call of every module.

    Extras travel in a collection of variables, beside the module's own parameters: under `nn.scan`
    each layer of a stack then has its own part, under `nn.remat` nothing escapes. Where all
    turns of a loop use one set of parameters (`nn.RNN`) nothing there can change: a handler passes
    arrays to `tracing.see`, which hands them out of the loop.

    Args:
      network: that runs.
      weights: its variables and quantizers; handlers see the inputs as these round them.
      inputs: see `Network.arguments`.
      handler: makes the call, `call.run()`, or another in its place.
      extras: pytrees of arrays by module path, with the axes of the module's stack in front. None:
        there are none, and handlers leave none.
      collection: where they travel: one that lifted transforms slice as they do the module.
      read_only: whether handlers leave what they got, so that the collection need not be mutable.
      collects: whether the handler passes arrays to `tracing.see`.

    Returns:
      `(outputs, left)`: by path of `extras` what the last call left there; by name of
      `tracing.see` a list of the arrays that it was given, with the turns of a loop in front.
    """
    extras = {} if extras is None else extras
    changes = [collection] if extras and not read_only else []

    def visit(call: ModuleCall) -> Any:
        before = None
        if extras and call.module.has_variable(collection, EXTRAS):
            before = call.module.get_variable(collection, EXTRAS)
        outputs, after = handler(call, before)
        if after is not before:
            call.module.put_variable(collection, EXTRAS, after)
        return outputs

    def forward(variables: Variables, inputs: Any) -> Any:
        placed = Weights(variables=variables, qparams=weights.qparams)
        return network.run(placed, inputs, visit, mutable=changes)

    variables, left = place(weights.variables, extras, collection), {}
    if collects:
        (outputs, changed), left = tracing.collect(forward, variables, as_inputs(inputs))
    else:
        outputs, changed = forward(variables, inputs)
    for path in extras if changes else ():
        left[path] = at_path(changed[collection], path)[EXTRAS]
    return outputs, left


def place(
    variables: Variables, extras: Mapping[str, Any], collection: str = "params"
) -> dict[str, Any]:
    """A copy of variables with extras beside the parameters of modules, by path."""
    if not extras:
        return variables
    tree = dict(variables[collection])
    for path, pytree in extras.items():
        copied(tree, path, "the extras")[EXTRAS] = pytree
    return {**variables, collection: tree}


def without_extras(variables: Any) -> Any:
    """Variables without extras."""
    if not isinstance(variables, Mapping):
        return variables
    return {k: without_extras(v) for k, v in variables.items() if k != EXTRAS}
