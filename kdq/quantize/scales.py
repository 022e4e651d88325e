"""The trainable part of the quantizers: their scales."""

from kdq.types import Array, QParams


def scales(qparams: QParams) -> dict[str, dict[str, Array]]:
    """`{path: {"weights": scale, "activations": scale}}`, the arrays of `qparams` that train."""
    return {
        path: {name: quantizer["scale"] for name, quantizer in quantizers.items()}
        for path, quantizers in qparams.items()
    }


def replace_scales(qparams: QParams, scales: dict[str, dict[str, Array]]) -> QParams:
    """`qparams` with the scales that `scales` has; what it does not name stays."""
    return {
        path: {
            name: {**quantizer, "scale": scales.get(path, {}).get(name, quantizer["scale"])}
            for name, quantizer in quantizers.items()
        }
        for path, quantizers in qparams.items()
    }
