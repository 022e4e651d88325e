"""What a model is made of: its quantizable layers, by module path, without running it.

Rules, calibration, cost, search and reports are all keyed by these paths.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdq.quantize import grid, kinds
from kdq.quantize.kinds import Kind, kind_of
from kdq.types import Array, QParams, Variables

FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One layer; shapes as the model sees them on the inputs given, without the axes of a stack."""

    path: str  # module path joined by "/", e.g. "Block_0/Conv_1"
    kind: str  # "Dense", "Conv", "Embed", ... (see `kinds`)
    weight_name: str  # the weight's name in the layer's params; "" for a product of activations
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    # Multiply-accumulates for one example, summed over the calls of a shared layer, and over the
    # layers of a stack, each called once.
    macs: int
    other_shape: tuple[int, ...] = ()  # of the second input of a product
    operands: tuple[str, ...] = ("activations",)  # the inputs that can be quantized
    channel_axes: tuple[int, ...] = (-1,)  # of the weight: those of a scale "per_channel"
    group_axis: int = -2  # of the weight: the one that "per_group" divides, along the inputs
    stack: tuple[int, ...] = ()  # leading axes of its parameters in `variables`: nn.scan, nn.vmap
    module: nn.Module | None = dataclasses.field(default=None, compare=False, repr=False)  # unbound

    @property
    def weight_count(self) -> int:
        """Weights, of the whole stack; 0 where there are none."""
        return math.prod((*self.stack, *self.weight_shape)) if self.weight_name else 0


def layer_bits(qparams: QParams, path: str) -> tuple[int, int]:
    """`(weight bits, activation bits)` of a layer; 32 where it stays in float.

    Of a product of two inputs the second has the place of the weight.
    """
    quantizers = qparams.get(path, {})
    second = "weights" if "weights" in quantizers else "other"
    return tuple(
        grid.bits(quantizers[name]) if name in quantizers else FLOAT_BITS
        for name in (second, "activations")
    )


def path_of(module: nn.Module) -> str:
    """A bound module's path, joined by "/"."""
    return "/".join(module.path)


def keys_of_layer(tree: Any, path: str) -> tuple[str, ...] | None:
    """Returns the keys that lead to a "/"-joined path in nested dicts, or None.

    A key may hold "/" itself, as of `nn.Dense(name="a/b")`.
    """
    if not path:
        return ()
    for key in tree if isinstance(tree, Mapping) else ():
        if key == path:
            return (key,)
        if path.startswith(f"{key}/"):
            rest = keys_of_layer(tree[key], path.removeprefix(f"{key}/"))
            if rest is not None:
                return (key, *rest)
    return None


def at_path(tree: Any, path: str) -> Any:
    """The subtree of a nested dict at a "/"-joined path. Raises KeyError."""
    keys = keys_of_layer(tree, path)
    if keys is None:
        raise KeyError(path)
    for key in keys:
        tree = tree[key]
    return tree


def as_args(inputs: Array | tuple) -> tuple:
    """A model's positional arguments: one array, or a tuple of them."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def batch_specs(inputs: Array | tuple, batch: Any) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of inputs with another batch size, which may be a symbolic dimension."""
    return [
        jax.ShapeDtypeStruct((batch, *jnp.shape(array)[1:]), jnp.result_type(array))
        for array in as_args(inputs)
    ]


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
    return _walk(model, variables, inputs, apply_kwargs)[0]


def list_unquantized(
    model: nn.Module, variables: Variables, inputs: Array | tuple, **apply_kwargs: Any
) -> dict[str, str]:
    """What no rule can reach, with the reason: modules with parameters, attention as it is set up.

    Arithmetic outside of modules can't be seen: a model that multiplies activations by `jnp` does
    so in float. Arguments as of `list_layers`.
    """
    return _walk(model, variables, inputs, apply_kwargs)[1]


def _walk(
    model: nn.Module, variables: Variables, inputs: Array | tuple, apply_kwargs: Mapping[str, Any]
) -> tuple[dict[str, LayerInfo], dict[str, str]]:
    """Traces a model unless it has been: every arm asks about the few models there are."""
    leaves, structure = jax.tree.flatten((variables, as_args(inputs)))
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    asked = (model, structure, shapes, tuple(sorted(apply_kwargs.items())))
    try:
        hash(asked)
    except TypeError:  # a field of the model is a list, or the like
        found = _traced.__wrapped__(*asked)
    else:
        found = _traced(*asked)
    return tuple(map(dict, found))


@functools.lru_cache(maxsize=64)
def _traced(
    model: nn.Module, structure: Any, shapes: tuple, apply_kwargs: tuple
) -> tuple[dict[str, LayerInfo], dict[str, str]]:
    specs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    variables, inputs = jax.tree.unflatten(structure, specs)
    layers: dict[str, LayerInfo] = {}
    once: dict[str, int] = {}
    others: dict[str, str] = {}
    # The model's, not the layer's: a model may fold time or space into a layer's leading axis.
    batch = inputs[0].shape[0]

    def record(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        outputs = next_fun(*args, **kwargs)
        module = context.module
        path = path_of(module)
        kind = kind_of(module)
        if kind is None or context.method_name not in kind.methods:
            if context.method_name == "__call__" and (reason := kinds.why_not(module)):
                others.setdefault(path, reason)
            return outputs
        shapes = [
            getattr(a, "shape", ()) for a in kinds.bind(module, context.method_name, args, kwargs)
        ]
        call = kinds.Call(context.method_name, args, kwargs, shapes, outputs.shape)
        try:
            layer = _describe(kind, module, path, variables, call, batch)
        except kinds.Unsupported as error:
            others[path] = str(error)
            return outputs
        if path in layers:
            known = layers[path]
            layer = dataclasses.replace(
                known,
                macs=known.macs + layer.macs,
                operands=tuple(dict.fromkeys((*known.operands, *layer.operands))),
            )
        once.setdefault(path, layer.macs)
        layers[path] = layer
        return outputs

    def forward(variables: Variables, *args: Any) -> Any:
        with nn.intercept_methods(kinds.name_products), nn.intercept_methods(record):
            return model.apply(variables, *args, **dict(apply_kwargs))

    jax.eval_shape(forward, variables, *inputs)
    return {path: _in_stack(layer, layers, once[path]) for path, layer in layers.items()}, others


def _in_stack(layer: LayerInfo, layers: Mapping[str, LayerInfo], once: int) -> LayerInfo:
    """The layer as part of its stack, if it is in one.

    `once` are the multiplications of one call: Flax traces the body of a scan more than once, so
    how often a layer is called in it can't be told. A product has no arrays that show the stack; it
    is that of the nearest layer with a weight.
    """
    if layer.weight_name:
        return dataclasses.replace(layer, macs=once) if layer.stack else layer
    parents = layer.path.split("/")[:-1]
    for depth in range(len(parents), 0, -1):
        prefix = "/".join(parents[:depth]) + "/"
        for other in layers.values():
            if other.weight_name and other.path.startswith(prefix):
                macs = once * math.prod(other.stack) if other.stack else layer.macs
                return dataclasses.replace(layer, stack=other.stack, macs=macs)
    return layer


def _describe(
    kind: Kind, module: nn.Module, path: str, variables: Variables, call: kinds.Call, batch: int
) -> LayerInfo:
    """The layer as this call shows it. Raises `kinds.Unsupported` for a stack of another form."""
    weight, stack = (), ()
    if kind.weight:
        weight = tuple(module.get_variable("params", kind.weight).shape)
        whole = tuple(at_path(variables["params"], path)[kind.weight].shape)
        stack = whole[: len(whole) - len(weight)]
        if whole != (*stack, *weight):
            raise kinds.Unsupported(
                f"{kind.name} in a stack whose axis is not the first: {whole} for {weight}"
            )
    channels, group = kind.axes(module, weight)
    return LayerInfo(
        path=path,
        kind=kind.name,
        weight_name=kind.weight,
        weight_shape=weight,
        input_shape=tuple(call.shapes[0]),
        other_shape=tuple(call.shapes[1]) if len(call.shapes) > 1 else (),
        output_shape=tuple(call.output),
        macs=kind.macs(module, call, weight) * math.prod(stack) // batch,
        operands=tuple(kind.methods[call.method]),
        channel_axes=channels,
        group_axis=group,
        stack=stack,
        module=module.clone(parent=None),
    )
