"""What a model is made of: its quantizable layers, by module path, without running it.

Rules, calibration, cost, search and reports are all keyed by these paths.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax

from kdq.types import Array, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One layer with a weight; shapes as the model sees them on the inputs given."""

    path: str  # module path joined by "/", e.g. "Block_0/Conv_1"
    kind: str  # "Dense" or "Conv"
    weight_name: str  # the weight's name in the layer's params
    weight_shape: tuple[int, ...]  # [..., in, out]: the last axis is the output channel
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int  # multiply-accumulates for one example, summed over the calls of a shared layer

    @property
    def weight_count(self) -> int:
        return math.prod(self.weight_shape)


# Linen class -> (kind, name of its weight). Both weights end in [..., in, out].
KINDS: dict[type[nn.Module], tuple[str, str]] = {
    nn.Dense: ("Dense", "kernel"),
    nn.Conv: ("Conv", "kernel"),
}


def path_of(module: nn.Module) -> str:
    return "/".join(module.path)


def at_path(tree: Any, path: str) -> Any:
    """The subtree of a nested dict at a "/"-joined path."""
    for name in path.split("/") if path else ():
        tree = tree[name]
    return tree


def as_args(inputs: Array | tuple) -> tuple:
    """A model's positional arguments: one array, or a tuple of them."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def list_layers(
    model: nn.Module, variables: Variables, inputs: Array | tuple, **apply_kwargs: Any
) -> dict[str, LayerInfo]:
    """The quantizable layers in the order in which they first run; nothing is computed.

    Args:
      model: any Linen module.
      variables: its variables, or their shapes.
      inputs: an array (or shape) with a leading batch axis, or a tuple of positional arguments.
      **apply_kwargs: passed to the model, e.g. `train=False`.
    """
    layers: dict[str, LayerInfo] = {}
    # The model's, not the layer's: a model may fold time or space into a layer's leading axis.
    batch = as_args(inputs)[0].shape[0]

    def record(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        kind = next((v for k, v in KINDS.items() if isinstance(context.module, k)), None)
        if kind is None or context.method_name != "__call__":
            return outputs
        name, weight = kind
        path = path_of(context.module)
        shape = at_path(variables["params"], path)[weight].shape
        macs = math.prod(outputs.shape[:-1]) * math.prod(shape) // batch
        if path in layers:
            layers[path] = dataclasses.replace(layers[path], macs=layers[path].macs + macs)
        else:
            layers[path] = LayerInfo(
                path=path,
                kind=name,
                weight_name=weight,
                weight_shape=tuple(shape),
                input_shape=tuple(args[0].shape),
                output_shape=tuple(outputs.shape),
                macs=macs,
            )
        return outputs

    def forward(variables, *args):
        with nn.intercept_methods(record):
            return model.apply(variables, *args, **apply_kwargs)

    jax.eval_shape(forward, variables, *as_args(inputs))
    return layers
