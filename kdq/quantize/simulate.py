"""The quantized `apply`: weights by a map over the params, activations on the way into a layer.

No JAX function is patched and no model rewritten, so a float teacher, a 4-bit student and an 8-bit
student live in one `jit`, in any order.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from kdq.quantize import kinds
from kdq.quantize.grid import Quantizer
from kdq.quantize.inputs import Batch, Inputs, as_inputs, unboxed
from kdq.quantize.inputs import run as run_float
from kdq.quantize.kinds import WEIGHT_NAMES
from kdq.quantize.layers import copied, keys_of_layer, path_of, unknown_layer
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables

# Where a layer finds the quantizers of its inputs. They travel inside "params", at the layer's own
# path, because that is the collection that Linen's lifted transforms (scan, vmap) slice.
QUANTIZERS = "_input_quantizers"

Rounding = Callable[[Array, Quantizer], Array]


def apply(
    model: nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Batch,
    /,
    *,
    freeze_norm: bool = False,
    rounding: Rounding = fake_quantize,
    **kwargs: Any,
) -> Any:
    """`model.apply(variables, inputs, **kwargs)` with the layers in `qparams` quantized.

    Args:
      model: any Linen module.
      variables: its float variables; unchanged.
      qparams: `{path: {"weights": quantizer, "activations": quantizer}}`, either half optional.
        Empty: the float model.
      inputs: an array, a tuple of positional arguments, a dict or another pytree that is one
        argument, or `Inputs`.
      freeze_norm: whether batch norm uses its running statistics, and keeps them, in training too.
      rounding: what a tensor becomes by its quantizer.
      **kwargs: passed to `model.apply` (`train`, `mutable`, `rngs`, a mask, ...).

    Raises:
      KeyError: if `qparams` names a layer that `variables` does not have.
    """
    call = as_inputs(inputs, kwargs)
    outputs, collections = run(
        model, unboxed(variables), qparams, call, freeze_norm=freeze_norm, rounding=rounding
    )
    return (outputs, collections) if call.kwargs.get("mutable", False) is not False else outputs


def run(
    model: nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Inputs,
    *interceptors: Callable,
    mutable: Iterable[str] = (),
    freeze_norm: bool = False,
    rounding: Rounding = fake_quantize,
) -> tuple[Any, dict[str, Any]]:
    """`(outputs, collections)` of the quantized model; see `apply`, and `run` of `inputs`.

    `interceptors` see the inputs of layers as these are rounded.
    """
    params = variables.get("params", {})
    quantized = {**variables, "params": quantize_params(params, qparams, rounding)}
    met: set[str] = set()
    interceptors = (*interceptors, partial(_quantize_inputs, met, rounding))
    if freeze_norm:
        interceptors = (*interceptors, _freeze_norm)
    result = run_float(model, quantized, inputs, *interceptors, mutable=mutable)
    for path in qparams:
        if path not in met and not has_path(params, path):
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
        inputs = {name: one for name, one in quantizers.items() if name != "weights"}
        if inputs:
            layer[QUANTIZERS] = inputs
    return params


def has_path(params: Any, path: str) -> bool:
    """Whether there is something at a "/"-joined path."""
    return keys_of_layer(params, path) is not None


def _freeze_norm(next_fun, args, kwargs, context):
    module = context.module
    if isinstance(module, nn.BatchNorm) and context.method_name == "__call__":
        # A bound module belongs to this one call. Flax takes the flag from the field or from the
        # call, and from both not.
        object.__setattr__(module, "use_running_average", True)
        kwargs = {k: v for k, v in kwargs.items() if k != "use_running_average"}
        args = args[:1]
    return next_fun(*args, **kwargs)


def _quantize_inputs(met, rounding, next_fun, args, kwargs, context):
    module = context.module
    operands = kinds.operands(module, context.method_name)
    if not operands or not module.has_variable("params", QUANTIZERS):
        return next_fun(*args, **kwargs)
    met.add(path_of(module))
    quantizers = module.get_variable("params", QUANTIZERS)
    for name, where in operands.items():
        if name in quantizers:
            value = rounding(kinds.argument(args, kwargs, where), quantizers[name])
            args, kwargs = kinds.replace_argument(args, kwargs, where, value)
    return next_fun(*args, **kwargs)


@partial(jax.jit, static_argnames=("model",))
def predict(model: nn.Module, variables: Variables, qparams: QParams, inputs: Batch) -> Array:
    """`apply` in evaluation mode, compiled once for a model and a set of quantized layers."""
    return apply(model, variables, qparams, inputs, train=False)
