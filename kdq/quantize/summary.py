"""A table of what is quantized in a model, and a list of what is not, with the reasons."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq.quantize import grid
from kdq.quantize.formats import FORMATS, stored_bytes
from kdq.quantize.inputs import Batch, unboxed
from kdq.quantize.layers import LayerInfo, list_layers, list_unquantized
from kdq.quantize.network import Network, as_network
from kdq.quantize.paths import at_path
from kdq.quantize.rules import QuantizationRule, TensorSpec, match, weight_scale_shape
from kdq.quantize.table import aligned
from kdq.types import QParams, Variables

FLOAT = "float"
DYNAMIC = " dynamic"  # after the number of bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One layer."""

    path: str
    kind: str
    weight_shape: tuple[int, ...]  # () for a product of activations
    input_shape: tuple[int, ...]
    stack: tuple[int, ...]
    weights: str  # bits, the name of a format, "float", or "" where there are none
    activations: str  # likewise; of a product "lhs × rhs"
    granularity: str  # weights, inputs
    observer: str  # weights, inputs; "" if not known
    macs: int  # multiply-accumulates for one example
    bytes: int  # the layer's parameters, in a packed file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A model, layer by layer; `str` is a plain table."""

    rows: tuple[Row, ...]
    unquantized: Mapping[str, str]  # {path: reason}: what no rule can reach
    unreached: Mapping[str, str]  # {layer: reason}: what a rule could reach, and none quantizes
    other_bytes: int  # of arrays that belong to no layer: norms, statistics

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers, for one example."""
        return sum(row.macs for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of all variables, without the header of a file."""
        return sum(row.bytes for row in self.rows) + self.other_bytes

    def __str__(self) -> str:
        names = ("layer", "kind", "weight", "input", "stack", "weights", "inputs", "granularity")
        names += ("observer", "MACs", "bytes")
        table = [_cells(row) for row in self.rows]
        table.append(("other arrays", *[""] * 9, f"{self.other_bytes:,}"))
        table.append(("total", *[""] * 8, f"{self.macs:,}", f"{self.bytes:,}"))
        columns = list(zip(*table, strict=True))
        shown = [i for i, column in enumerate(columns) if any(column)]
        lines = aligned([[row[i] for i in shown] for row in (names, *table)], numbers=2)
        for title, reasons in (
            ("quantized by no rule", self.unreached),
            ("out of reach of rules", self.unquantized),
        ):
            lines += ["", f"{title}:" if reasons else f"{title}: nothing"]
            lines += [f"  {path or _ROOT}: {reason}" for path, reason in reasons.items()]
        return "\n".join(lines)


_ROOT = '""'  # the path of a model that is one layer


def _cells(row: Row) -> tuple[str, ...]:
    shape = lambda s: "×".join(map(str, s))
    return (
        row.path or _ROOT,
        row.kind,
        *(shape(s) for s in (row.weight_shape, row.input_shape, row.stack)),
        *(row.weights, row.activations, row.granularity, row.observer),
        *(f"{row.macs:,}", f"{row.bytes:,}"),
    )


def summary(
    network: Network | nn.Module,
    variables: Variables,
    qparams_or_rules: QParams | Sequence[QuantizationRule],
    inputs: Batch,
) -> Summary:
    """Tells how each layer of a model is quantized, or why it is not; nothing is computed.

    Args:
      network: any Linen module, or a `Network`.
      variables: its variables, or their shapes.
      qparams_or_rules: calibrated quantizers, or the rules to calibrate by: these show observers.
      inputs: of one batch, as of `list_layers`.

    Raises:
      ValueError: rules or quantizers that fit no layer.
    """
    network, variables = as_network(network), unboxed(variables)
    layers = list_layers(network, variables, inputs)
    unquantized = list_unquantized(network, variables, inputs)
    if isinstance(qparams_or_rules, Mapping):
        tensors, unreached = _from_qparams(qparams_or_rules, layers)
    else:
        tensors, unreached = _from_rules(qparams_or_rules, layers, unquantized)
    rows = []
    for path, layer in layers.items():
        weights, inputs_of = tensors.get(path, (None, {}))
        rows.append(_row(layer, variables, weights, inputs_of))
    total = sum(_nbytes(leaf) for leaf in jax.tree.leaves(variables))
    layer_bytes = sum(_params_bytes(layer, variables) for layer in layers.values())
    return Summary(
        rows=tuple(rows),
        unquantized=unquantized,
        unreached=unreached,
        other_bytes=total - layer_bytes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    """The quantization of one tensor."""

    bits: int
    name: str
    granularity: str
    observer: str
    scale_bytes: int  # of what is stored beside it
    zero_points: int  # so many float32 more


_Found = dict[str, tuple[_Tensor | None, dict[str, _Tensor]]]


def _from_rules(
    rules: Sequence[QuantizationRule],
    layers: Mapping[str, LayerInfo],
    unquantized: Mapping[str, str],
) -> tuple[_Found, dict[str, str]]:
    matched = match(rules, layers, unquantized)
    tensors, unreached = {}, {}
    for path, layer in layers.items():
        rule = matched.get(path)
        if rule is None:
            unreached[path] = "no rule matches"
            continue
        weights = None
        if rule.weights is not None and layer.weight_name:
            weights = _describe_spec(rule.weights, layer)
        inputs = {}
        if rule.activations is not None:
            inputs = {operand: _describe_spec(rule.activations, None) for operand in layer.operands}
        tensors[path] = (weights, inputs)
        if weights is None and not inputs:
            unreached[path] = f"rule {rule.path!r} leaves it in float"
    return tensors, unreached


def _describe_spec(spec: TensorSpec, layer: LayerInfo | None) -> _Tensor:
    """Describes a weight, or an input if there is no layer."""
    scales, scale_bytes = 0, 0
    if layer is not None:
        scales = math.prod((*layer.stack, *weight_scale_shape(spec, layer)))
        scale_format = FORMATS[spec.format].scale_format if spec.format else ""
        scale_bytes = stored_bytes(scales, math.prod(layer.stack), scale_format)
    granularity = spec.granularity
    if spec.group_size is not None:
        granularity += f" {spec.group_size}"
    return _Tensor(
        bits=spec.width,
        name=(spec.format or str(spec.width)) + DYNAMIC * spec.dynamic,
        granularity=granularity,
        observer="" if spec.dynamic else repr(spec.observer),
        scale_bytes=scale_bytes,
        zero_points=0 if spec.symmetric else scales,
    )


def _from_qparams(
    qparams: QParams, layers: Mapping[str, LayerInfo]
) -> tuple[_Found, dict[str, str]]:
    unknown = [path for path in qparams if path not in layers]
    if unknown:
        raise ValueError(f"qparams name {unknown}; the layers are {list(layers)}")
    tensors = {}
    for path, quantizers in qparams.items():
        layer = layers[path]
        weights = quantizers.get("weights")
        tensors[path] = (
            None if weights is None else _describe_quantizer(weights, layer, layer.weight_shape),
            {
                k: _describe_quantizer(v, layer, None)
                for k, v in quantizers.items()
                if k != "weights"
            },
        )
    unreached = {path: "it has no quantizer" for path in layers if not qparams.get(path)}
    return tensors, unreached


def _describe_quantizer(
    quantizer: grid.Quantizer, layer: LayerInfo, weight_shape: tuple[int, ...] | None
) -> _Tensor:
    """Describes a weight, or an input if there is no shape."""
    scale = np.shape(quantizer.scale)
    dynamic = quantizer.dynamic
    if dynamic is not None:
        granularity = dynamic.granularity
        if dynamic.group_size is not None:
            granularity += f" {dynamic.group_size}"
    elif weight_shape is None:
        granularity = "per_channel" if len(scale) > len(layer.stack) else "per_tensor"
    else:
        granularity = _granularity(scale[len(layer.stack) :], weight_shape, layer)
    constant = np.ptp(np.asarray(quantizer.zero_point)) == 0
    count = math.prod(scale)
    bits = grid.bits(quantizer)
    return _Tensor(
        bits=bits,
        name=(_format(quantizer) or str(bits)) + DYNAMIC * (dynamic is not None),
        granularity=granularity,
        observer="",
        scale_bytes=stored_bytes(count, math.prod(layer.stack), quantizer.scale_format),
        zero_points=0 if constant else count,
    )


def _granularity(scale: tuple[int, ...], weight: tuple[int, ...], layer: LayerInfo) -> str:
    """Names the granularity that a weight's scale has by its shape."""
    if all(size == 1 for size in scale):
        return "per_tensor"
    channels = {axis % len(weight) for axis in layer.channel_axes}
    for axis, (size, full) in enumerate(zip(scale, weight, strict=True)):
        if axis not in channels and size != 1:
            return f"per_group {full // size}"
    return "per_channel"


def _format(quantizer: grid.Quantizer) -> str:
    """The name of the format whose levels, and rounding of scales, a quantizer has; or ""."""
    if quantizer.levels is None:
        return ""
    levels = np.asarray(quantizer.levels).reshape(-1, np.shape(quantizer.levels)[-1])[0]
    for name, format in FORMATS.items():
        same = len(format.levels) == len(levels) and np.allclose(format.levels, levels)
        if same and format.scale_format == quantizer.scale_format:
            return name
    return f"{len(levels)} levels"


def _row(
    layer: LayerInfo, variables: Variables, weights: _Tensor | None, inputs: Mapping[str, _Tensor]
) -> Row:
    size = _params_bytes(layer, variables)
    if weights is not None:
        weight = at_path(variables["params"], layer.path)[layer.weight_name]
        packed = -(-layer.weight_count * weights.bits // 8)
        size += packed + weights.scale_bytes + 4 * weights.zero_points - _nbytes(weight)
    input_names = [inputs[o].name if o in inputs else FLOAT for o in layer.operands]
    tensors = [t for t in (weights, *inputs.values()) if t is not None]
    weight_name = FLOAT if weights is None else weights.name
    return Row(
        path=layer.path,
        kind=layer.kind,
        weight_shape=layer.weight_shape,
        input_shape=layer.input_shape,
        stack=layer.stack,
        weights=weight_name if layer.weight_name else "",
        activations=" × ".join(input_names),
        granularity=", ".join(dict.fromkeys(t.granularity for t in tensors)),
        observer=", ".join(dict.fromkeys(t.observer for t in tensors if t.observer)),
        macs=layer.macs,
        bytes=size,
    )


def _params_bytes(layer: LayerInfo, variables: Variables) -> int:
    """Bytes of the layer's parameters in float; a product has none."""
    if not layer.weight_name:
        return 0
    return sum(_nbytes(leaf) for leaf in jax.tree.leaves(at_path(variables["params"], layer.path)))


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
