"""The trainable part of the quantizers: their scales, and what else a method trains."""

import re
from collections.abc import Callable, Sequence

from kdq.quantize.grid import Quantizer
from kdq.types import Array, QParams

# {path: {"weights" | "activations" | "other": {field of the quantizer: array}}}
Scales = dict[str, dict[str, dict[str, Array]]]


def scales(qparams: QParams, *, fixed: Sequence[str] = ()) -> Scales:
    """The arrays of `qparams` that train: of each quantizer what its `training.trains` names.

    Args:
      qparams: calibrated quantizers; one that is dynamic has nothing to train.
      fixed: patterns; a quantizer whose whole "PATH/weights" or "PATH/activations" matches one is
        left out.  The scale of the network's own input is a good one to fix: pixels do not move
        while the network trains, and its gradient alone asks for that of the whole input, a third
        of the first layer's time.
    """
    trained: Scales = {}
    for path, quantizers in qparams.items():
        for name, quantizer in quantizers.items():
            if any(re.fullmatch(pattern, f"{path}/{name}") for pattern in fixed):
                continue
            if quantizer.training.trains and quantizer.dynamic is None:
                arrays = {field: getattr(quantizer, field) for field in quantizer.training.trains}
                trained.setdefault(path, {})[name] = arrays
    return trained


def replace_scales(qparams: QParams, scales: Scales) -> QParams:
    """`qparams` with what `scales` has; what it does not name stays."""
    change = lambda key, quantizer: quantizer.replace(**scales.get(key[0], {}).get(key[1], {}))
    return map_quantizers(change, qparams)


def map_quantizers(change: Callable[[tuple[str, str], Quantizer], Quantizer], qparams: QParams):
    """`qparams` with `change((path, name), quantizer)` in place of each quantizer."""
    return {
        path: {name: change((path, name), quantizer) for name, quantizer in quantizers.items()}
        for path, quantizers in qparams.items()
    }
