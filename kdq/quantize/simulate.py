"""The quantized `apply`: weights by a map over the params, activations on the way into a layer.

No JAX function is patched and no model rewritten, so a float teacher, a 4-bit student and an 8-bit
student live in one `jit`, in any order.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax

from kdq.quantize.layers import KINDS, as_args
from kdq.quantize.ste import fake_quantize
from kdq.types import Array, QParams, Variables

# Where a layer finds the quantizer of its input. It travels inside "params", at the layer's own
# path, because that is the collection that Linen's lifted transforms (scan, vmap) slice.
QUANTIZER = "_input_quantizer"

WEIGHT_NAMES = tuple({weight for _, weight in KINDS.values()})


def apply(
    model: nn.Module, variables: Variables, qparams: QParams, inputs: Array | tuple, **kwargs: Any
) -> Any:
    """`model.apply(variables, inputs, **kwargs)` with the layers in `qparams` quantized.

    Args:
      model: any Linen module.
      variables: its float variables; unchanged.
      qparams: `{path: {"weights": quantizer, "activations": quantizer}}`, either half optional.
        Empty: the float model.
      inputs: an array, or a tuple of positional arguments.
      **kwargs: passed to `model.apply` (`train`, `mutable`, `rngs`, ...).

    Raises:
      KeyError: if `qparams` names a layer that `variables` does not have.
    """
    params = quantize_params(variables["params"], qparams)
    with nn.intercept_methods(_quantize_input):
        return model.apply({**variables, "params": params}, *as_args(inputs), **kwargs)


def quantize_params(params: Any, qparams: QParams) -> dict[str, Any]:
    """A copy of `params` with rounded weights, and each layer's input quantizer beside them."""
    params = dict(params)
    for path, quantizers in qparams.items():
        layer, parents = params, []
        for name in path.split("/") if path else ():  # "": the model is the layer
            if name not in layer:
                raise KeyError(
                    f"qparams name layer {path!r}, which the params do not have: "
                    f"at {'/'.join(parents) or 'the top'} there is {sorted(layer)}"
                )
            layer[name] = dict(layer[name])
            layer = layer[name]
            parents.append(name)
        if "weights" in quantizers:
            name = next(n for n in WEIGHT_NAMES if n in layer)
            layer[name] = fake_quantize(layer[name], **quantizers["weights"])
        if "activations" in quantizers:
            layer[QUANTIZER] = dict(quantizers["activations"])
    return params


def _quantize_input(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != "__call__" or not module.has_variable("params", QUANTIZER):
        return next_fun(*args, **kwargs)
    quantizer = module.get_variable("params", QUANTIZER)
    return next_fun(fake_quantize(args[0], **quantizer), *args[1:], **kwargs)


@partial(jax.jit, static_argnames=("model",))
def predict(
    model: nn.Module, variables: Variables, qparams: QParams, inputs: Array | tuple
) -> Array:
    """`apply` in evaluation mode, compiled once for a model and a set of quantized layers."""
    return apply(model, variables, qparams, inputs, train=False)
