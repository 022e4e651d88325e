"""Which layers are quantized, and how: an ordered list of rules, the first that matches wins."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from kdq.quantize.formats import FORMATS
from kdq.quantize.layers import LayerInfo
from kdq.quantize.observers import AbsMax, Observer

GRANULARITIES = ("per_tensor", "per_channel", "per_group", "per_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """The quantization of one tensor: a weight, or the input of a layer."""

    bits: int | None = None  # 1 to 8; one signed bit is the sign times a scale
    format: str = ""  # or, in place of bits, a number format: a key of `formats.FORMATS`
    symmetric: bool = True  # False: affine, with an integer zero point
    signed: bool | None = None  # None: weights are signed; inputs are if calibration saw below 0
    narrow: bool = False  # drop the most negative code; of two bits that leaves -1, 0 and 1
    # "per_tensor", "per_channel" (a weight's outputs, an input's last axis), "per_group" (of a
    # weight's inputs; of the last axis of a dynamic input), "per_token" (dynamic inputs only).
    granularity: str = "per_tensor"
    group_size: int | None = None  # elements that share a scale; with "per_group" only
    group_axis: int | None = None  # of the weight, where groups are not along the inputs
    dynamic: bool = False  # inputs only: the range is that of each tensor, not of calibration
    observer: Observer = AbsMax()  # chooses the range

    def __post_init__(self):
        if (self.bits is None) == (not self.format):
            raise ValueError(
                f"bits={self.bits!r}, format={self.format!r}: expected one or the other; formats "
                f"are {tuple(FORMATS)}"
            )
        if self.format:
            self._check_format()
        elif not (isinstance(self.bits, int) and type(self.bits) is int and 1 <= self.bits <= 8):
            raise ValueError(f"bits={self.bits!r}: expected a whole number from 1 to 8")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r}: expected one of {GRANULARITIES}")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError(
                f"group_size={self.group_size!r} with granularity={self.granularity!r}: "
                "group_size goes with 'per_group', and only with it"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size!r}: expected at least 1")
        if self.group_axis is not None and self.granularity != "per_group":
            raise ValueError(f"group_axis={self.group_axis!r}: only with 'per_group'")
        if self.narrow and (self.signed is False or not self.symmetric):
            raise ValueError("narrow=True is for signed symmetric grids")
        if self.dynamic and self.granularity == "per_channel":
            raise ValueError("dynamic=True: expected 'per_tensor', 'per_token' or 'per_group'")
        if self.granularity == "per_token" and not self.dynamic:
            raise ValueError("granularity='per_token' has no fixed scale: expected dynamic=True")

    def _check_format(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r}: expected one of {tuple(FORMATS)}")
        if not self.symmetric or self.narrow or self.signed is not None:
            raise ValueError(f"format={self.format!r} has its own levels: no symmetric, narrow")
        block = FORMATS[self.format].group_size
        if block and self.granularity == "per_tensor":
            object.__setattr__(self, "granularity", "per_group")
            object.__setattr__(self, "group_size", block)
        if block and self.group_size != block:
            raise ValueError(f"format={self.format!r} has groups of {block}: {self.group_size!r}")

    @property
    def width(self) -> int:
        """Bits of a code."""
        return FORMATS[self.format].bits if self.format else self.bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationRule:
    """The quantization of the layers whose whole path matches `path`."""

    path: str  # regular expression, matched against the whole layer path
    weights: TensorSpec | None = None  # None: float
    activations: TensorSpec | None = None  # the layer's input; None: float

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"rule path {self.path!r} is no regular expression: {error}"
            ) from error
        if self.weights is not None and self.weights.dynamic:
            raise ValueError(f"rule {self.path!r}: dynamic is for activations, not weights")
        inputs = self.activations
        if inputs is not None and inputs.granularity == "per_group" and not inputs.dynamic:
            raise ValueError(f"rule {self.path!r}: per_group activations need dynamic=True")


def match(
    rules: Sequence[QuantizationRule],
    layers: Mapping[str, LayerInfo],
    unquantized: Mapping[str, str] | None = None,
) -> dict[str, QuantizationRule]:
    """The rule of each layer that has one, in layer order.

    Args:
      rules: the first that matches a layer is its.
      layers: see `list_layers`.
      unquantized: see `list_unquantized`; for the error.

    Raises:
      ValueError: if a rule's path matches no layer, or its group size does not divide the inputs.
    """
    for rule in rules:
        if not any(re.fullmatch(rule.path, path) for path in layers):
            others = (unquantized or {}).items()
            reasons = {path: why for path, why in others if re.fullmatch(rule.path, path)}
            raise ValueError(
                f"rule path {rule.path!r} matches no layer; the layers are {list(layers)}"
                + (f"; out of reach: {reasons}" if reasons else "")
            )
    matched = {}
    for path, layer in layers.items():
        rule = next((r for r in rules if re.fullmatch(r.path, path)), None)
        if rule is None:
            continue
        matched[path] = rule
        if rule.weights is not None and layer.weight_name:
            weight_scale_shape(rule.weights, layer)
        if rule.activations is not None:
            for operand in layer.operands:
                activation_scale_shape(rule.activations, layer, operand)
    return matched


def weight_scale_shape(spec: TensorSpec, layer: LayerInfo) -> tuple[int, ...]:
    """Shape of the scale of a layer's weight, aligned with the weight, without its stack.

    Raises ValueError for groups that do not divide, or an axis that is not there.
    """
    shape = layer.weight_shape
    scale = [1] * len(shape)
    if spec.granularity == "per_tensor":
        return tuple(scale)
    for axis in layer.channel_axes:
        scale[axis] = shape[axis]
    if spec.granularity == "per_group":
        axis = layer.group_axis if spec.group_axis is None else spec.group_axis
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"layer {layer.path!r}: group_axis={axis} of a weight {shape}")
        scale[axis] = _groups(spec, layer, shape[axis], f"inputs (weight shape {shape})")
    return tuple(scale)


def activation_scale_shape(spec: TensorSpec, layer: LayerInfo, operand: str) -> tuple[int, ...]:
    """Shape of the scale of a layer's input: a scalar, or one a channel (last axis).

    Raises ValueError for groups that do not divide the last axis.
    """
    last = (layer.other_shape if operand == "other" else layer.input_shape)[-1]
    if spec.granularity == "per_group":
        _groups(spec, layer, last, "channels")
    return (last,) if spec.granularity == "per_channel" else ()


def _groups(spec: TensorSpec, layer: LayerInfo, size: int, what: str) -> int:
    if size % spec.group_size:
        raise ValueError(
            f"layer {layer.path!r}: group_size={spec.group_size} does not divide its {size} {what}"
        )
    return size // spec.group_size


def uniform_rules(
    weight_bits: int | None,
    activation_bits: int | None,
    *,
    keep: Sequence[str] = (),
    keep_bits: int = 8,
    observer: Observer = AbsMax(),
) -> tuple[QuantizationRule, ...]:
    """The usual recipe: weights per channel, inputs per tensor, and `keep` at `keep_bits`.

    Args:
      weight_bits: 1 to 8, or None for float weights.
      activation_bits: likewise for the layers' inputs; None is weight-only quantization.
      keep: path patterns of the layers to spare, most often the first and the last.
      keep_bits: their bits, in place of each width that is not None.
      observer: chooses every range.
    """

    def spec(bits: int | None, granularity: str) -> TensorSpec | None:
        if bits is None:
            return None
        return TensorSpec(bits=bits, granularity=granularity, observer=observer)

    def rule(path: str, weight_bits: int | None, activation_bits: int | None) -> QuantizationRule:
        return QuantizationRule(
            path=path,
            weights=spec(weight_bits, "per_channel"),
            activations=spec(activation_bits, "per_tensor"),
        )

    kept = [None if b is None else keep_bits for b in (weight_bits, activation_bits)]
    return (*(rule(path, *kept) for path in keep), rule(".*", weight_bits, activation_bits))
