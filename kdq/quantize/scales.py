"""The trainable part of the quantizers: their scales."""

import re
from collections.abc import Sequence

from kdq.types import Array, QParams


def scales(qparams: QParams, *, fixed: Sequence[str] = ()) -> dict[str, dict[str, Array]]:
    """`{path: {"weights": scale, "activations": scale}}`, the arrays of `qparams` that train.

    Args:
      qparams: calibrated quantizers.
      fixed: patterns; a scale whose whole "PATH/weights" or "PATH/activations" matches one is left
        out.  The scale of the network's own input is a good one to fix: pixels do not move while
        the network trains, and its gradient alone asks for that of the whole input, a third of the
        first layer's time.
    """
    found = {}
    for path, quantizers in qparams.items():
        trained = {
            name: quantizer["scale"]
            for name, quantizer in quantizers.items()
            if not any(re.fullmatch(pattern, f"{path}/{name}") for pattern in fixed)
        }
        if trained:
            found[path] = trained
    return found


def replace_scales(qparams: QParams, scales: dict[str, dict[str, Array]]) -> QParams:
    """`qparams` with the scales that `scales` has; what it does not name stays."""
    return {
        path: {
            name: {**quantizer, "scale": scales.get(path, {}).get(name, quantizer["scale"])}
            for name, quantizer in quantizers.items()
        }
        for path, quantizers in qparams.items()
    }
