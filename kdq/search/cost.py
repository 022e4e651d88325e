"""What a model costs, layer by layer, at given bits."""

from collections.abc import Mapping

from kdq.quantize.layers import LayerInfo, layer_bits
from kdq.types import QParams


def macs(layers: Mapping[str, LayerInfo]) -> int:
    """Multiply-accumulates for one example."""
    return sum(layer.macs for layer in layers.values())


def bops(layers: Mapping[str, LayerInfo], qparams: QParams) -> int:
    """Bit operations for one example: Σ MACs × weight bits × activation bits (arXiv:2005.07093)."""
    total = 0
    for path, layer in layers.items():
        weight_bits, activation_bits = layer_bits(qparams, path)
        total += layer.macs * weight_bits * activation_bits
    return total
