"""The walk over a network's layers: a handler sees each call, with what lies beside its parameters.

Listing, observing, reconstructing, capturing, integer execution and export are handlers.
"""

from collections.abc import Callable, Mapping
from typing import Any

from kdq.quantize import tracing
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Batch, as_inputs
from kdq.quantize.network import Network, Weights
from kdq.quantize.paths import at_path, copied
from kdq.types import Variables

BESIDE = "_beside"

# (a call, the pytree beside its module or None) -> (outputs, the pytree that is there afterwards).
# To return the very pytree that it got is to leave it alone.
Handler = Callable[[ModuleCall, Any], tuple[Any, Any]]


def walk(
    network: Network,
    weights: Weights,
    inputs: Batch,
    handler: Handler,
    beside: Mapping[str, Any] | None = None,
    *,
    collection: str = "params",
    read_only: bool = False,
    collects: bool = False,
) -> tuple[Any, dict[Any, Any]]:
    """Runs a network in evaluation mode with a handler around every call of every module.

    What lies beside a module's parameters travels in a collection of variables, at the module's own
    path: under `nn.scan` each layer of a stack then has its own part, under `nn.remat` nothing
    escapes. Where one set of parameters is used by all turns of a loop (`nn.RNN`) nothing there can
    change: a handler passes arrays to `tracing.see`, which hands them out of the loop.

    Args:
      network: that runs.
      weights: its variables and quantizers; handlers see the inputs as these round them.
      inputs: see `Network.arguments`.
      handler: makes the call, `call.run()`, or another in its place.
      beside: pytrees of arrays by module path, with the axes of the module's stack in front. None:
        there are none, and handlers leave none.
      collection: where they travel: one that lifted transforms slice as they do the module.
      read_only: whether handlers leave what they got, so that the collection need not be mutable.
      collects: whether the handler passes arrays to `tracing.see`.

    Returns:
      `(outputs, left)`: by path of `beside` the pytree that the last call left there; by name of
      `tracing.see` a list of the arrays that it was given, with the turns of a loop in front.
    """
    beside = {} if beside is None else beside
    changes = [collection] if beside and not read_only else []

    def visit(call: ModuleCall) -> Any:
        before = None
        if beside and call.module.has_variable(collection, BESIDE):
            before = call.module.get_variable(collection, BESIDE)
        outputs, after = handler(call, before)
        if after is not before:
            call.module.put_variable(collection, BESIDE, after)
        return outputs

    def forward(variables: Variables, inputs: Any) -> Any:
        placed = Weights(variables=variables, qparams=weights.qparams)
        return network.run(placed, inputs, visit, mutable=changes)

    variables, left = place(weights.variables, beside, collection), {}
    if collects:
        (outputs, changed), left = tracing.collect(forward, variables, as_inputs(inputs))
    else:
        outputs, changed = forward(variables, inputs)
    for path in beside if changes else ():
        left[path] = at_path(changed[collection], path)[BESIDE]
    return outputs, left


def place(
    variables: Variables, beside: Mapping[str, Any], collection: str = "params"
) -> dict[str, Any]:
    """A copy of variables with pytrees beside the parameters of modules, by path."""
    if not beside:
        return variables
    tree = dict(variables[collection])
    for path, pytree in beside.items():
        copied(tree, path, "the walk's pytrees")[BESIDE] = pytree
    return {**variables, collection: tree}


def without_beside(variables: Any) -> Any:
    """Variables as they are without what lies beside parameters."""
    if not isinstance(variables, Mapping):
        return variables
    return {k: without_beside(v) for k, v in variables.items() if k != BESIDE}
