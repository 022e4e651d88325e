"""The quantized weights out of the params, and back into them."""

from collections.abc import Mapping
from typing import Any

from kdq.quantize import simulate
from kdq.quantize.kinds import WEIGHT_NAMES
from kdq.quantize.layers import at_path
from kdq.types import Array, QParams


def weights_of(params: Any, qparams: QParams) -> dict[str, Array]:
    """The weights that have quantizers, by layer path."""
    layers = {path: at_path(params, path) for path, q in qparams.items() if "weights" in q}
    return {path: own[weight_name(own)] for path, own in layers.items()}


def weight_name(layer: Mapping[str, Any]) -> str:
    """The name of the weight among the params of a layer."""
    return next(name for name in WEIGHT_NAMES if name in layer)


def put_weights(params: Any, weights: Mapping[str, Array]) -> dict[str, Any]:
    """A copy of `params` with these weights, each in the dtype that it has."""
    params = dict(params)
    for path, weight in weights.items():
        layer = simulate.copied(params, path, "weights")
        name = weight_name(layer)
        layer[name] = weight.astype(layer[name].dtype)
    return params
