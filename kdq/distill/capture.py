"""A model's logits and the outputs of chosen layers, with no edit of the model."""

import re
import zlib
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import flax.linen as nn
import flax.struct
import jax
from flax import traverse_util
from flax.errors import InvalidRngError

from kdq import quantize
from kdq.quantize.inputs import Batch
from kdq.quantize.network import Network, as_network
from kdq.types import Array, QParams, Variables

T = TypeVar("T")
# Flax's words; nothing else of the error says which stream there is none of.
_MISSING = re.compile(r'needs PRNG for "([^"]*)"')


class Outputs(flax.struct.PyTreeNode):
    """The outputs of a model for a batch."""

    logits: Array | None  # [batch, classes]; None where only sparse targets are stored
    features: dict[str, Array] = flax.struct.field(default_factory=dict)  # by layer path


def run(
    network: Network | nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Batch,
    layers: Collection[str] = (),
    *,
    mutable: Collection[str] = (),
    **kwargs: Any,
) -> tuple[Outputs, dict[str, Any]]:
    """`quantize.apply`, with the outputs of the modules whose paths are `layers`.

    Layers are module paths, "block_0/conv"; what the module returns is captured, so an activation
    function that follows is not in it. Returns the outputs, and the collections of `mutable` as the
    model left them. ValueError if a layer was not called, or more than once (a shared module).
    """
    paths = frozenset(layers)
    network = as_network(network)
    outputs, state = quantize.apply(
        network,
        variables,
        qparams,
        inputs,
        mutable=[*mutable, "intermediates"],
        capture_intermediates=lambda module, method: (
            method == "__call__" and "/".join(module.path) in paths
        ),
        **kwargs,
    )
    captured = _by_path(state.pop("intermediates", {}))
    for path in sorted(paths):
        calls = len(captured.get(path, ()))
        if calls != 1:
            raise ValueError(
                f"layer {path!r} was called {calls} times in one forward pass: expected 1"
            )
    logits = network.select_prediction(outputs)
    return Outputs(logits=logits, features={path: captured[path][0] for path in paths}), state


def list_outputs(
    network: Network | nn.Module, variables: Variables, inputs: Batch
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every path that `run` can capture and what is found there; nothing is computed.

    Modules that do not return one array (an LSTM's cell) and those called more than once are left
    out; so is the model itself, whose output are the logits.
    """

    def everything(variables, inputs):
        options = {"mutable": ["intermediates"], "capture_intermediates": True}
        return quantize.apply(network, variables, {}, inputs, **options)[1]

    captured = _by_path(jax.eval_shape(everything, variables, inputs).get("intermediates", {}))
    return {
        path: calls[0]
        for path, calls in captured.items()
        if path and len(calls) == 1 and isinstance(calls[0], jax.ShapeDtypeStruct)
    }


def _by_path(intermediates: Any) -> dict[str, tuple]:
    flat = traverse_util.flatten_dict(intermediates)
    return {"/".join(path[:-1]): calls for path, calls in flat.items() if path[-1] == "__call__"}


def with_streams(forward: Callable[[dict[str, Array]], T], key: Array) -> T:
    """Returns `forward(rngs)`, with a key for every stream that the model asks `make_rng` for.

    "dropout" gets `key`, the step's; each other the key folded in with its name, so that a stream's
    numbers depend on the step and on its name alone. `forward` traces or runs a model, again for
    each stream that was missing.

    Raises:
      InvalidRngError: a stream that is there does not reach the module: a lifted transform
        (`nn.scan`, `nn.vmap`) needs it in its `split_rngs`.
    """
    rngs = {"dropout": key}
    while True:
        try:
            return forward(dict(rngs))
        except InvalidRngError as error:
            missing = _MISSING.search(str(error))
            if missing is None or missing[1] in rngs:
                raise
            rngs[missing[1]] = jax.random.fold_in(key, zlib.crc32(missing[1].encode()))
