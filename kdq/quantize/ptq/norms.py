"""The batch norms of a model, and the layers whose outputs they normalize."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Batch, Inputs, as_inputs
from kdq.quantize.kinds import kind_of
from kdq.quantize.network import Network, Weights, as_network
from kdq.quantize.paths import at_path
from kdq.quantize.walk import walk
from kdq.types import Array, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """One `nn.BatchNorm`."""

    path: str
    axes: tuple[int, ...]  # of its input: those that keep statistics, negative, ascending
    epsilon: float
    stack: tuple[int, ...]  # leading axes of its variables: nn.scan, nn.vmap
    source: str | None  # the layer whose output it normalizes, in all of its calls
    reason: str  # why there is none; "" if there is


def list_norms(
    network: Network | nn.Module, variables: Variables, inputs: Batch
) -> dict[str, Norm]:
    """The batch norms in the order in which they first run; nothing is computed.

    A norm and a layer belong together if the norm's input is the very array that the layer
    returned. Shared ones do too, where each call of the one goes with a call of the other.
    """
    # The arrays themselves: kept alive, so that none is mistaken for a later one at its address.
    outputs: list[tuple[Any, str]] = []
    calls: dict[str, list[str | None]] = {}
    norms: dict[str, Norm] = {}

    def record(call: ModuleCall, extras: Any) -> tuple[Any, Any]:
        result = call.run()
        if call.method != "__call__":
            return result, extras
        if kind_of(call.module) is not None:
            outputs.append((result, call.path))
        elif isinstance(call.module, nn.BatchNorm):
            x = call.argument(0, "x")
            source = next((path for output, path in outputs if output is x), None)
            calls.setdefault(call.path, []).append(source)
            norms[call.path] = _describe(call.module, call.path, x.ndim, variables)
        return result, extras

    def forward(variables: Variables, inputs: Inputs) -> Any:
        weights = Weights(variables=variables, qparams={})
        return walk(as_network(network), weights, inputs, record)[0]

    jax.eval_shape(forward, variables, as_inputs(inputs))
    runs = collections.Counter(path for _, path in outputs)
    return {path: _pair(norm, calls, runs) for path, norm in norms.items()}


def _describe(module: nn.BatchNorm, path: str, rank: int, variables: Variables) -> Norm:
    axes = module.axis if isinstance(module.axis, Sequence) else (module.axis,)
    shape = module.get_variable("batch_stats", "mean").shape
    whole = at_path(variables["batch_stats"], path)["mean"].shape
    return Norm(
        path=path,
        axes=tuple(sorted({axis % rank - rank for axis in axes})),
        epsilon=module.epsilon,
        stack=tuple(whole[: len(whole) - len(shape)]),
        source=None,
        reason="",
    )


def _pair(norm: Norm, calls: Mapping[str, list[str | None]], runs: Mapping[str, int]) -> Norm:
    """The norm with its layer, or with the reason why it has none."""
    sources = list(dict.fromkeys(calls[norm.path]))
    if len(sources) > 1:
        return dataclasses.replace(norm, reason=f"shared: it normalizes the outputs of {sources}")
    (source,) = sources
    if source is None:
        return dataclasses.replace(norm, reason="its input is not the output of a layer")
    others = [path for path, met in calls.items() if source in met and path != norm.path]
    if others:
        return dataclasses.replace(norm, reason=f"the output of {source!r} also goes to {others}")
    if runs[source] != len(calls[norm.path]):
        reason = f"{source!r} is shared: it runs more often than the norm"
        return dataclasses.replace(norm, reason=reason)
    return dataclasses.replace(norm, source=source)


def is_folded(norm: Norm, variables: Variables) -> bool:
    """Returns whether the norm multiplies by exactly 1, as `fold_batch_norm` leaves it."""
    var = np.asarray(at_path(variables["batch_stats"], norm.path)["var"])
    params = params_of(norm, variables)
    return bool(
        (var == identity_variance(norm)).all() and (np.asarray(params.get("scale", 1)) == 1).all()
    )


def affine(norm: Norm, variables: Variables) -> tuple[np.ndarray, np.ndarray]:
    """`(factor, offset)` with which the norm's output is `x * factor + offset`; float64.

    Each has the norm's stack in front, and then an axis for each of its axes.
    """
    stats = at_path(variables["batch_stats"], norm.path)
    mean, var = (np.asarray(stats[name], np.float64) for name in ("mean", "var"))
    params = {k: np.asarray(v, np.float64) for k, v in params_of(norm, variables).items()}
    factor = params.get("scale", 1.0) / np.sqrt(var + np.float64(np.float32(norm.epsilon)))
    return factor, params.get("bias", 0.0) - mean * factor


def identity_variance(norm: Norm) -> np.float32:
    """The variance that, with epsilon added in float32, is exactly 1."""
    return np.float32(1) - np.float32(norm.epsilon)


def params_of(norm: Norm, variables: Variables) -> Mapping[str, Array]:
    """The norm's "scale" and "bias", as far as it has them."""
    params: Any = variables.get("params", {})
    for name in norm.path.split("/") if norm.path else ():
        params = params.get(name, {})
    return params
