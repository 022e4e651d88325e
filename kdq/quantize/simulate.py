"""Quantized layers: weights by a map over the params, activations on the way into a layer.

No JAX function is patched and no model rewritten, so a float teacher, a 4-bit student and an 8-bit
student live in one `jit`, in any order.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn

from kdq.quantize import calls
from kdq.quantize.calls import Handler, ModuleCall
from kdq.quantize.grid import Quantizer
from kdq.quantize.inputs import Inputs
from kdq.quantize.kinds import WEIGHT_NAMES, weight_name
from kdq.quantize.paths import at_path, copied, has_path, unknown_layer
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables

# Where a layer finds the quantizers of its inputs. They travel inside "params", at the layer's own
# path, because that is the collection that Linen's lifted transforms (scan, vmap) slice.
QUANTIZERS = "_input_quantizers"

Rounding = Callable[[Array, Quantizer], Array]


def run(
    module: nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Inputs,
    *handlers: Handler,
    mutable: Iterable[str] = (),
    freeze_norm: bool = False,
    rounding: Rounding = fake_quantize,
) -> tuple[Any, dict[str, Any]]:
    """`(outputs, collections)` of a quantized module, called just as `inputs` say.

    See `Network.apply`, which adds what a network knows of its call, and `calls.run`. Handlers see
    the inputs of layers as these are rounded.
    """
    params = variables.get("params", {})
    quantized = {**variables, "params": quantize_params(params, qparams, rounding)}
    called: set[str] = set()
    handlers = (*handlers, partial(_quantize_inputs, called, rounding))
    if freeze_norm:
        handlers = (*handlers, _freeze_norm)
    result = calls.run(module, quantized, inputs, *handlers, mutable=mutable)
    for path in qparams:
        if path not in called and not has_path(params, path):
            raise unknown_layer("qparams", path, params)
    return result


def quantize_params(
    params: Any, qparams: QParams, rounding: Rounding = fake_quantize
) -> dict[str, Any]:
    """A copy of `params` with rounded weights, and each layer's input quantizers beside them."""
    params = dict(params)
    for path, quantizers in qparams.items():
        layer = copied(params, path, "qparams")
        if "weights" in quantizers:
            name = next((n for n in WEIGHT_NAMES if n in layer), None)
            if name is None:
                raise unknown_layer("qparams", path, params)
            layer[name] = rounding(layer[name], quantizers["weights"])
        inputs = {name: quantizer for name, quantizer in quantizers.items() if name != "weights"}
        if inputs:
            layer[QUANTIZERS] = inputs
    return params


def _freeze_norm(call: ModuleCall) -> Any:
    if isinstance(call.module, nn.BatchNorm) and call.method == "__call__":
        # A bound module belongs to this one call. Flax takes the flag from the field or from the
        # call, and from both not.
        object.__setattr__(call.module, "use_running_average", True)
        kwargs = {k: v for k, v in call.kwargs.items() if k != "use_running_average"}
        call = dataclasses.replace(call, args=call.args[:1], kwargs=kwargs)
    return call.run()


def _quantize_inputs(called: set[str], rounding: Rounding, call: ModuleCall) -> Any:
    operands = call.operands
    if not operands or not call.module.has_variable("params", QUANTIZERS):
        return call.run()
    called.add(call.path)
    quantizers = call.module.get_variable("params", QUANTIZERS)
    rounded = {k: rounding(x, quantizers[k]) for k, x in operands.items() if k in quantizers}
    return call.with_operands(**rounded).run()


def weights_of(params: Any, qparams: QParams) -> dict[str, Array]:
    """The weights that have quantizers, by layer path."""
    layers = {path: at_path(params, path) for path, q in qparams.items() if "weights" in q}
    return {path: params[weight_name(params)] for path, params in layers.items()}


def rounded(variables: Variables, qparams: QParams) -> Variables:
    """The variables with every quantized weight on its grid, rounded to nearest."""
    only = {path: {"weights": q["weights"]} for path, q in qparams.items() if "weights" in q}
    return {**variables, "params": quantize_params(variables["params"], only)}


def put_weights(params: Any, weights: Mapping[str, Array]) -> dict[str, Any]:
    """A copy of `params` with these weights, each in the dtype that it has."""
    params = dict(params)
    for path, weight in weights.items():
        layer = copied(params, path, "weights")
        name = weight_name(layer)
        layer[name] = weight.astype(layer[name].dtype)
    return params
