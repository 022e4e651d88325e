"""The quantized `apply`: weights by a map over the params, activations on the way into a layer.

No JAX function is patched and no model rewritten, so a float teacher, a 4-bit student and an 8-bit
student live in one `jit`, in any order.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from kdq.quantize import kinds
from kdq.quantize.grid import Quantizer
from kdq.quantize.kinds import WEIGHT_NAMES
from kdq.quantize.layers import as_args, keys_of_layer, path_of
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
    inputs: Array | tuple,
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
      inputs: an array, or a tuple of positional arguments.
      freeze_norm: whether batch norm uses its running statistics, and keeps them, in training too.
      rounding: what a tensor becomes by its quantizer.
      **kwargs: passed to `model.apply` (`train`, `mutable`, `rngs`, ...).

    Raises:
      KeyError: if `qparams` names a layer that `variables` does not have.
    """
    params = quantize_params(variables["params"], qparams, rounding)
    met: set[str] = set()
    with contextlib.ExitStack() as stack:
        stack.enter_context(nn.intercept_methods(kinds.name_products))
        stack.enter_context(nn.intercept_methods(partial(_quantize_inputs, met, rounding)))
        if freeze_norm:
            stack.enter_context(nn.intercept_methods(_freeze_norm))
        outputs = model.apply({**variables, "params": params}, *as_args(inputs), **kwargs)
    for path in qparams:
        if path not in met and not has_path(variables["params"], path):
            raise unknown_layer("qparams", path, variables["params"])
    return outputs


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


def copied(params: dict[str, Any], path: str, whose: str) -> dict[str, Any]:
    """The dict of a layer in `params`, itself and every dict on the way replaced by a copy.

    The last may be new, and empty: a product of activations has no parameters of its own.
    """
    keys = keys_of_layer(params, path)
    if keys is None:
        parent, _, last = path.rpartition("/")
        parents = keys_of_layer(params, parent)
        if parents is None:
            raise unknown_layer(whose, path, params)
        keys = (*parents, last)
    layer = params
    for name in keys:  # none of them: the model is the layer
        layer[name] = dict(layer.get(name, {}))
        layer = layer[name]
    return layer


def has_path(params: Any, path: str) -> bool:
    """Whether there is something at a "/"-joined path."""
    return keys_of_layer(params, path) is not None


def unknown_layer(whose: str, path: str, params: Any) -> KeyError:
    """The error for a path that is no layer: it says how far the path goes, and what is there."""
    parents, layer = [], params
    for name in path.split("/"):
        if name not in layer:
            break
        parents.append(name)
        layer = layer[name]
    return KeyError(
        f"{whose} name layer {path!r}, which the params do not have: "
        f"at {'/'.join(parents) or 'the top'} there is {sorted(layer)}"
    )


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
def predict(
    model: nn.Module, variables: Variables, qparams: QParams, inputs: Array | tuple
) -> Array:
    """`apply` in evaluation mode, compiled once for a model and a set of quantized layers."""
    return apply(model, variables, qparams, inputs, train=False)
