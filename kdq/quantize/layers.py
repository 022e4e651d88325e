"""Lists the quantizable layers of a model, by module path, without running it.

Rules, calibration, cost, search and reports are all keyed by these paths.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdq.quantize import grid, kinds, tracing
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Batch, Inputs, as_inputs, unboxed
from kdq.quantize.kinds import Kind, kind_of
from kdq.quantize.network import Network, Weights, as_network
from kdq.quantize.parametrized import leaf_names, why_changed, why_made
from kdq.quantize.paths import at_path
from kdq.quantize.tracing import Marked
from kdq.quantize.walk import walk
from kdq.types import QParams, Variables

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
    # Multiply-accumulates for one example, summed over the calls of a shared layer (each step of a
    # recurrent one), and over the layers of a stack, each called once.
    macs: int
    other_shape: tuple[int, ...] = ()  # of the second input of a product
    operands: tuple[str, ...] = ("activations",)  # the inputs that can be quantized
    channel_axes: tuple[int, ...] = (-1,)  # of the weight: those of a scale "per_channel"
    group_axis: int = -2  # of the weight: the one that "per_group" divides, along the inputs
    stack: tuple[int, ...] = ()  # leading axes of its parameters in `variables`: nn.scan, nn.vmap
    in_loop: bool = False  # called in a loop over the same weights: a cell of nn.RNN
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


def list_layers(
    network: Network | nn.Module, variables: Variables, inputs: Batch
) -> dict[str, LayerInfo]:
    """The quantizable layers in the order in which they first run; nothing is computed.

    Args:
      network: any Linen module, or a `Network`.
      variables: its variables, or their shapes.
      inputs: an array (or shape) with a leading batch axis, a tuple of positional arguments,
        another pytree of arrays, which is one argument, or `Inputs`.
    """
    return _list(network, variables, inputs)[0]


def list_unquantized(
    network: Network | nn.Module, variables: Variables, inputs: Batch
) -> dict[str, str]:
    """Returns what no rule can reach, and why: modules with parameters, attention as it is set up.

    Layers that multiply by something else than their parameter (`nn.WeightNorm`, standardized
    weights) are among them. Arithmetic outside of modules can't be seen: a model that multiplies
    activations by `jnp` does so in float. Arguments as of `list_layers`.
    """
    return _list(network, variables, inputs)[1]


def _list(
    network: Network | nn.Module, variables: Variables, inputs: Batch
) -> tuple[dict[str, LayerInfo], dict[str, str]]:
    """Traces a model unless it has been: every arm asks about the few models there are."""
    leaves, structure = jax.tree.flatten((unboxed(variables), as_inputs(inputs)))
    key = (as_network(network), structure, tuple(map(_shape, leaves)))
    try:
        hash(key)
    except TypeError:  # a field of the model is a list, or the like
        listed = _traced.__wrapped__(*key)
    else:
        listed = _traced(*key)
    return tuple(map(dict, listed))


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), getattr(leaf, "dtype", jnp.result_type(leaf)))


@functools.lru_cache(maxsize=64)
def _traced(
    network: Network, structure: Any, shapes: tuple
) -> tuple[dict[str, LayerInfo], dict[str, str]]:
    variables, inputs = jax.tree.unflatten(structure, shapes)
    if not inputs.rows:
        raise ValueError(f"expected inputs with at least one example, got {inputs}")
    listing = _Listing(variables)

    def forward(variables: Variables, inputs: Inputs) -> Any:
        return walk(network, Weights(variables=variables, qparams={}), inputs, listing.record)[0]

    calls: dict[str, list[tuple[Marked, int]]] = collections.defaultdict(list)
    for marked in tracing.marks(forward, variables, inputs):
        path, macs = marked.name
        calls[path].append((marked, macs))
    sliced = frozenset[int]().union(*(m.sliced for group in calls.values() for m, _ in group))
    names = leaf_names(variables)
    layers, others = {}, listing.others
    for path, layer in listing.layers.items():
        marks = [marked for marked, _ in calls[path]]
        name = "/".join(filter(None, ("params", path, layer.weight_name)))
        reason = (why_made(name, marks, names) if layer.weight_name else "") or _why_no_loop(
            layer, marks
        )
        if reason:
            others[path] = reason
        else:
            layers[path] = layer
    if len(layers) < len(listing.layers) and layers:
        for path in _unreached(network, variables, inputs, layers):
            del layers[path]
            others[path] = "its variables are made by a transform that takes none but the model's"
    counted = {
        path: _counted(layer, layers, calls[path], sliced, inputs.rows)
        for path, layer in layers.items()
    }
    return counted, others


class _Listing:
    """Lists what a run of the model meets, by path."""

    def __init__(self, variables: Variables):
        self.variables = variables
        self.layers: dict[str, LayerInfo] = {}
        self.others: dict[str, str] = {}
        self.alone = False  # a layer is being traced alone

    def record(self, layer_call: ModuleCall, extras: Any) -> tuple[Any, Any]:
        """A handler of `walk`."""
        outputs = layer_call.run()
        if not self.alone:
            self._record(layer_call, outputs)
        return outputs, extras

    def _record(self, layer_call: ModuleCall, outputs: Any) -> None:
        module, method, path = layer_call.module, layer_call.method, layer_call.path
        kind = layer_call.kind
        if kind is None:
            if method == "__call__" and (reason := kinds.why_not(module)):
                self.others.setdefault(path, reason)
            return
        # The inputs that can be quantized, or the first if none can.
        arrays = list(layer_call.operands.values()) or [layer_call.argument(0, "inputs")]
        shapes = [getattr(array, "shape", ()) for array in arrays]
        call = kinds.Call(method, layer_call.args, layer_call.kwargs, shapes, outputs.shape)
        try:
            layer = _describe(kind, module, path, self.variables, call)
            self._check(module, call)
        except kinds.Unsupported as error:
            self.others[path] = str(error)
            self.layers.pop(path, None)
            return
        if path in self.layers:
            operands = (*self.layers[path].operands, *layer.operands)
            layer = dataclasses.replace(self.layers[path], operands=tuple(dict.fromkeys(operands)))
        if path not in self.others:
            self.layers[path] = layer
        weight = module.get_variable("params", kind.weight) if kind.weight else None
        tracing.mark((path, kind.macs(module, call, layer.weight_shape)), weight, arrays[0])

    def _check(self, module: nn.Module, call: kinds.Call) -> None:
        """Raises `kinds.Unsupported` for a layer that changes its weight itself."""
        if not kind_of(module).weight:
            return
        self.alone = True
        reason = why_changed(module, call.method, call.args, call.kwargs)
        self.alone = False
        if reason:
            raise kinds.Unsupported(reason)


def _why_no_loop(layer: LayerInfo, marks: Sequence[Marked]) -> str:
    """Why the inputs of a layer in a stack and in a loop can't be told apart by layer."""
    for marked in marks:
        slicing = [number in marked.sliced for number, _ in marked.loops]
        if layer.stack and (marked.spread > 1 or not all(slicing)):
            outermost = slicing[: len(layer.stack)]
            if marked.spread > 1 or len(outermost) < len(layer.stack) or not all(outermost):
                return "a stack of layers in a loop over one set of weights"
    return ""


def _unreached(
    network: Network, variables: Variables, inputs: Inputs, layers: Mapping[str, LayerInfo]
) -> list[str]:
    """The layers that do not see what is put beside their parameters, as quantizers are.

    A transform of variables, as of `nn.WeightNorm`, may change it, lose it, or fail for it.
    """

    def record(call: ModuleCall, probe: Any) -> tuple[Any, Any]:
        if kind_of(call.module) is not None and probe is not None:
            tracing.mark(call.path, probe.scale, probe.qmin)
        return call.run(), probe

    def reached(paths: Sequence[str]) -> set[str]:
        def forward(probes: Mapping[str, Any], variables: Variables, inputs: Inputs) -> Any:
            weights = Weights(variables=variables, qparams={})
            return walk(network, weights, inputs, record, probes, read_only=True)[0]

        probes = {}
        for path in paths:
            zero = jax.ShapeDtypeStruct(layers[path].stack, jnp.float32)
            probes[path] = grid.Quantizer(scale=zero, zero_point=zero, qmin=zero, qmax=zero)
        marks = tracing.marks(forward, probes, variables, inputs)
        names = leaf_names(probes)
        return {m.name for m in marks if m.leaf is not None and names[m.leaf].endswith("scale")}

    def quietly(paths: Sequence[str]) -> set[str]:
        try:
            return reached(paths)
        except Exception:  # whatever somebody's transform raises
            return set()

    seen = quietly(list(layers))
    if not seen:
        seen = set().union(*(quietly([path]) for path in layers))
    return [path for path in layers if path not in seen]


def _counted(
    layer: LayerInfo,
    layers: Mapping[str, LayerInfo],
    calls: Sequence[tuple[Marked, int]],
    sliced: frozenset[int],
    rows: int,
) -> LayerInfo:
    """The layer with its multiplications, the stack that it is in, and whether it is in a loop.

    A product has no arrays that show the stack; it is that of the nearest layer with a weight.
    """
    stack, macs, in_loop = layer.stack, 0, False
    if not layer.weight_name:
        stack = _stack_around(layer.path, layers)
    for marked, each in calls:
        slicing = marked.sliced if layer.weight_name else sliced
        turns = [count for number, count in marked.loops if number not in slicing]
        in_loop |= bool(turns) or marked.spread > 1
        macs += each * math.prod(turns) * marked.spread
    macs = macs * math.prod(stack) // rows
    return dataclasses.replace(layer, stack=stack, macs=macs, in_loop=in_loop)


def _stack_around(path: str, layers: Mapping[str, LayerInfo]) -> tuple[int, ...]:
    parents = path.split("/")[:-1]
    for depth in range(len(parents), 0, -1):
        prefix = "/".join(parents[:depth]) + "/"
        for other in layers.values():
            if other.weight_name and other.path.startswith(prefix):
                return other.stack
    return ()


def _describe(
    kind: Kind, module: nn.Module, path: str, variables: Variables, call: kinds.Call
) -> LayerInfo:
    """The layer as this call shows it, its multiplications not counted.

    Raises `kinds.Unsupported` for a stack of another form, and a weight that is no parameter.
    """
    weight, stack = (), ()
    if kind.weight:
        if not module.has_variable("params", kind.weight):
            raise kinds.Unsupported(f"{kind.name} without a parameter {kind.weight!r}")
        weight = tuple(module.get_variable("params", kind.weight).shape)
        try:
            whole = tuple(at_path(variables["params"], path)[kind.weight].shape)
        except KeyError:
            raise kinds.Unsupported(
                f"its {kind.weight} is not where it is called: shared by another name, or computed"
            ) from None
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
        macs=0,
        operands=tuple(kind.methods[call.method]),
        channel_axes=channels,
        group_axis=group,
        stack=stack,
        module=module.clone(parent=None),
    )
