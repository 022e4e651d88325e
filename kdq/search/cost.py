"""What a model costs, layer by layer, at given bits."""

from collections.abc import Mapping

from kdq.quantize import LayerInfo, grid
from kdq.types import QParams

FLOAT_BITS = 32


def macs(layers: Mapping[str, LayerInfo]) -> int:
    """Multiply-accumulates for one example."""
    return sum(layer.macs for layer in layers.values())


def layer_bits(qparams: QParams, path: str) -> tuple[int, int]:
    """`(weight bits, activation bits)` of a layer; 32 where it stays in float."""
    quantizers = qparams.get(path, {})
    return tuple(
        grid.bits(quantizers[half]) if half in quantizers else FLOAT_BITS
        for half in ("weights", "activations")
    )


def bops(layers: Mapping[str, LayerInfo], qparams: QParams) -> int:
    """Bit operations for one example: Σ MACs × weight bits × activation bits (arXiv:2005.07093)."""
    total = 0
    for path, layer in layers.items():
        weight_bits, activation_bits = layer_bits(qparams, path)
        total += layer.macs * weight_bits * activation_bits
    return total
