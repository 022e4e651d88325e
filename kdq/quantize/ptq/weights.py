"""The quantized weights out of the params, and back into them."""

from collections.abc import Mapping
from typing import Any

from kdq.quantize import simulate
from kdq.quantize.kinds import weight_name
from kdq.quantize.paths import at_path, copied
from kdq.types import Array, QParams, Variables


def weights_of(params: Any, qparams: QParams) -> dict[str, Array]:
    """The weights that have quantizers, by layer path."""
    layers = {path: at_path(params, path) for path, q in qparams.items() if "weights" in q}
    return {path: params[weight_name(params)] for path, params in layers.items()}


def rounded(variables: Variables, qparams: QParams) -> Variables:
    """The variables with every quantized weight on its grid, rounded to nearest."""
    only = {path: {"weights": q["weights"]} for path, q in qparams.items() if "weights" in q}
    return {**variables, "params": simulate.quantize_params(variables["params"], only)}


def put_weights(params: Any, weights: Mapping[str, Array]) -> dict[str, Any]:
    """A copy of `params` with these weights, each in the dtype that it has."""
    params = dict(params)
    for path, weight in weights.items():
        layer = copied(params, path, "weights")
        name = weight_name(layer)
        layer[name] = weight.astype(layer[name].dtype)
    return params
