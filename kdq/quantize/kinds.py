"""The kinds of layers that can be quantized, and what sets each apart: a table, not a hierarchy.

A new kind is one entry: where its weight and its inputs are, which axes of the weight are channels,
and how many multiplications it makes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import opt_einsum

from kdq.models import Product

Shape = tuple[int, ...]


class Unsupported(Exception):
    """Why this layer can't be quantized."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer, by shapes."""

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: Sequence[Shape]  # of the inputs that the kind names
    output: Shape


def _general_axes(module: nn.DenseGeneral, weight: Shape) -> tuple[tuple[int, ...], int]:
    """Kernel [batch dims..., contracted..., features...]: all but the contracted are channels."""
    features = len(_tuple(module.features))
    batch = len(_tuple(module.batch_dims))
    rank = len(weight)
    channels = (*range(-features, 0), *range(-rank, batch - rank))
    return channels, -features - 1


def _transposed_axes(module: nn.ConvTranspose, weight: Shape) -> tuple[tuple[int, ...], int]:
    return ((-2,), -1) if module.transpose_kernel else ((-1,), -2)


def _einsum_axes(module: nn.Einsum, weight: Shape) -> tuple[tuple[int, ...], int]:
    """Channels are the kernel's axes that the output keeps; groups divide the first other one."""
    if module.einsum_str is None:
        return (), -1
    terms, output = module.einsum_str.replace(" ", "").split("->")
    kernel = terms.split(",")[1].replace("...", "")
    rank = len(kernel)
    channels = tuple(i - rank for i, label in enumerate(kernel) if label in output)
    contracted = [i - rank for i, label in enumerate(kernel) if label not in output]
    return channels, (contracted or [-1])[-1]


def _contraction(module: nn.Module, call: Call, weight: Shape) -> int:
    """Each output is a sum over the weight's elements of its own channels."""
    channels = math.prod(weight[axis] for axis in kind_of(module).axes(module, weight)[0])
    return math.prod(call.output) * math.prod(weight) // channels


def _transposed(module: nn.ConvTranspose, call: Call, weight: Shape) -> int:
    """Each input meets each tap of each output channel."""
    channels = call.shapes[0][-1]
    return math.prod(call.shapes[0]) // channels * math.prod(weight)


def _local(module: nn.ConvLocal, call: Call, weight: Shape) -> int:
    """Each output has a kernel of its own: [*positions, taps × channels, features]."""
    return math.prod(call.output) * weight[-2]


def _embedding(module: nn.Embed, call: Call, weight: Shape) -> int:
    """A lookup multiplies nothing; `attend` multiplies by all of the table."""
    return 0 if call.method == "__call__" else math.prod(call.shapes[0]) * weight[0]


def _einsum(equation: str, *shapes: Shape) -> int:
    terms, _, _ = opt_einsum.parser.parse_einsum_input((equation, *shapes), shapes=True)
    sizes = {}
    for labels, shape in zip(terms.split(","), shapes, strict=True):
        sizes |= dict(zip(labels, shape, strict=True))
    return math.prod(sizes.values())


def _einsum_layer(module: nn.Einsum, call: Call, weight: Shape) -> int:
    position = call.args[1] if len(call.args) > 1 else call.kwargs.get("einsum_str")
    return _einsum(module.einsum_str or position, call.shapes[0], weight)


def _product(module: Product, call: Call, weight: Shape) -> int:
    return _einsum(call.args[0], *call.shapes)


INPUT = {"activations": (0, "inputs")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Facts about a Linen class."""

    name: str
    weight: str = "kernel"  # its name in the layer's params; "" if it has none
    # {method: {operand: (position, keyword) of the argument}}
    methods: Mapping[str, Mapping[str, tuple[int, str]]] = dataclasses.field(
        default_factory=lambda: {"__call__": INPUT}
    )
    # (module, weight) -> (channels, the axis of groups)
    axes: Callable[[nn.Module, Shape], tuple[tuple[int, ...], int]] = lambda *_: ((-1,), -2)
    macs: Callable[[nn.Module, Call, Shape], int] = _contraction  # of the whole batch


KINDS: dict[type[nn.Module], Kind] = {
    nn.Dense: Kind(name="Dense"),
    nn.DenseGeneral: Kind(name="DenseGeneral", axes=_general_axes),
    nn.Conv: Kind(name="Conv"),
    nn.ConvLocal: Kind(name="ConvLocal", macs=_local),
    nn.ConvTranspose: Kind(name="ConvTranspose", axes=_transposed_axes, macs=_transposed),
    nn.Einsum: Kind(name="Einsum", axes=_einsum_axes, macs=_einsum_layer),
    nn.Embed: Kind(
        name="Embed",
        weight="embedding",
        methods={"__call__": {}, "attend": {"activations": (0, "query")}},
        axes=lambda *_: ((-2,), -1),
        macs=_embedding,
    ),
    Product: Kind(
        name="Product",
        weight="",
        methods={"__call__": {"activations": (1, "lhs"), "other": (2, "rhs")}},
        axes=lambda *_: ((), -1),
        macs=_product,
    ),
}

WEIGHT_NAMES = tuple(dict.fromkeys(kind.weight for kind in KINDS.values() if kind.weight))


def weight_name(layer: Mapping[str, Any]) -> str:
    """The name of the weight among the params of a layer."""
    return next(name for name in WEIGHT_NAMES if name in layer)


NORMS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, or None."""
    return next((kind for cls, kind in KINDS.items() if isinstance(module, cls)), None)


def operands(module: nn.Module, method: str) -> Mapping[str, tuple[int, str]]:
    """The inputs of a call that can be quantized, by name."""
    kind = kind_of(module)
    return kind.methods.get(method, {}) if kind else {}


def argument(args: tuple, kwargs: Mapping[str, Any], where: tuple[int, str]) -> Any:
    """The argument of a call at a position or by its keyword."""
    position, keyword = where
    return args[position] if position < len(args) else kwargs[keyword]


def replace_argument(
    args: tuple, kwargs: Mapping[str, Any], where: tuple[int, str], value: Any
) -> tuple[tuple, dict[str, Any]]:
    """`(args, kwargs)` with that argument changed."""
    position, keyword = where
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), dict(kwargs)
    return args, {**kwargs, keyword: value}


def why_not(module: nn.Module) -> str:
    """Why a module that is no layer can't be quantized; "" if there is nothing to quantize."""
    if isinstance(module, nn.MultiHeadDotProductAttention):
        return _why_not_attention(module)
    names = [k for k, v in module.variables.get("params", {}).items() if hasattr(v, "shape")]
    if isinstance(module, NORMS):
        return "normalization stays in float, unless it is folded" if names else ""
    if names:
        return f"{type(module).__name__} is no kind of layer that kdq knows; parameters {names}"
    return ""


def _why_not_attention(module: nn.MultiHeadDotProductAttention) -> str:
    if module.attention_fn is not nn.dot_product_attention:
        return "its products are inside an attention_fn of its own"
    if module.qk_attn_weights_einsum_cls is not None and not _is_named(module):
        return "its products are made by a qk_attn_weights_einsum_cls of its own"
    if module.precision is not None:
        return f"its products, because Flax names them only without precision={module.precision!r}"
    return ""


def _is_named(module: nn.MultiHeadDotProductAttention) -> bool:
    factory = module.qk_attn_weights_einsum_cls
    return getattr(factory, "func", factory) is Product


def _tuple(x: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(x) if isinstance(x, Sequence) else (x,)
