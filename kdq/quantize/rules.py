"""Which layers are quantized, and how: an ordered list of rules, the first that matches wins."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from kdq.quantize.layers import LayerInfo
from kdq.quantize.observers import AbsMax, Observer

GRANULARITIES = ("per_tensor", "per_channel", "per_group")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How one tensor (a weight, or the input of a layer) is quantized."""

    bits: int  # 1 to 8; one signed bit is the sign times a scale
    symmetric: bool = True  # False: affine, with an integer zero point
    signed: bool | None = None  # None: weights are signed; inputs are if calibration saw below 0
    narrow: bool = False  # drop the most negative code, so that the signed grid is symmetric
    granularity: str = "per_tensor"  # or "per_channel" (last axis), "per_group" (weights only)
    group_size: int | None = None  # inputs that share a scale; with "per_group" only
    observer: Observer = AbsMax()  # chooses the range

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits!r}: want a whole number from 1 to 8")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r}: want one of {GRANULARITIES}")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError(
                f"group_size={self.group_size!r} with granularity={self.granularity!r}: "
                "group_size goes with 'per_group', and only with it"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size!r}: want at least 1")
        if self.narrow and (self.signed is False or not self.symmetric):
            raise ValueError("narrow=True is for signed symmetric grids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationRule:
    """What happens to the layers whose whole path matches `path`."""

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
        if self.activations is not None and self.activations.granularity == "per_group":
            raise ValueError(f"rule {self.path!r}: per_group is for weights, not activations")


def match(
    rules: Sequence[QuantizationRule], layers: Mapping[str, LayerInfo]
) -> dict[str, QuantizationRule]:
    """The rule of each layer that has one, in layer order.

    Raises:
      ValueError: if a rule's path matches no layer, or its group size does not divide the inputs.
    """
    for rule in rules:
        if not any(re.fullmatch(rule.path, path) for path in layers):
            raise ValueError(
                f"rule path {rule.path!r} matches no layer; the layers are {list(layers)}"
            )
    matched = {}
    for path, layer in layers.items():
        rule = next((r for r in rules if re.fullmatch(r.path, path)), None)
        if rule is None:
            continue
        matched[path] = rule
        if rule.weights is not None:
            weight_scale_shape(rule.weights, layer)
    return matched


def weight_scale_shape(spec: TensorSpec, layer: LayerInfo) -> tuple[int, ...]:
    """Shape of the scale of a layer's weight `[..., in, out]`, aligned with the weight."""
    *rest, inputs, outputs = layer.weight_shape
    ones = (1,) * len(rest)
    if spec.granularity == "per_tensor":
        return (*ones, 1, 1)
    if spec.granularity == "per_channel":
        return (*ones, 1, outputs)
    if inputs % spec.group_size:
        raise ValueError(
            f"layer {layer.path!r}: group_size={spec.group_size} does not divide its {inputs} "
            f"inputs (weight shape {layer.weight_shape})"
        )
    return (*ones, inputs // spec.group_size, outputs)


def activation_scale_shape(spec: TensorSpec, layer: LayerInfo) -> tuple[int, ...]:
    """Shape of the scale of a layer's input: a scalar, or one a channel (last axis)."""
    return (layer.input_shape[-1],) if spec.granularity == "per_channel" else ()


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
