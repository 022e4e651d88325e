"""Finds where NaN or infinity came from."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from kdq.distill.capture import with_streams
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Inputs, unboxed
from kdq.quantize.network import Weights, as_network
from kdq.train.training import Training, TrainState
from kdq.types import Array, Batch


class NonFiniteError(RuntimeError):
    """Training met NaN or infinity."""


def _is_finite(tree: Any) -> Array:
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all() if leaves else jnp.bool_(True)


def first_nonfinite(training: Training, state: TrainState, batch: Batch) -> str:
    """Returns the first place, in the order of a step, that holds NaN or infinity, in words."""
    objective = training.objective
    inputs = objective.task.inputs(batch)
    if not _is_finite(inputs):
        return "the input images"
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    taught, _ = training.teacher.ask(
        state.teacher, batch, inputs, objective.teacher_layers, jax.random.fold_in(key, 1)
    )
    if not _is_finite(taught):
        return "what the teacher says"
    # Whether parameters and output of each layer are finite, in the order of calls.
    finite: dict[str, dict[str, Array]] = {}
    trained: dict[str, list[Array]] = {}
    for (*layer, _), leaf in traverse_util.flatten_dict(state.params).items():
        trained.setdefault("/".join(layer), []).append(leaf)

    def watch(call: ModuleCall) -> Any:
        outputs = call.run()
        if call.method == "__call__":
            # Those that train as well: rounding clips infinity.
            params = call.module.variables.get("params", {}), trained.get(call.path)
            checks = {"parameters": _is_finite(params), "output": _is_finite(outputs)}
            finite.setdefault(call.path, checks)
        return outputs

    weights = Weights(variables=unboxed(state.variables), qparams=state.quantizers)

    def forward(rngs: dict[str, Array]) -> None:
        call = Inputs(*inputs, rngs=rngs)
        network = as_network(training.network)
        network.run(weights, call, watch, train=True, mutable=list(state.model_state))

    with_streams(forward, key)
    for path, parts in finite.items():
        for part, is_finite in parts.items():
            if not is_finite:
                return f"the {part} of layer {path!r}" if path else f"the model's {part}"
    for name, params in state.adapters.items():
        if not _is_finite(params):
            return f"the adapter of term {name!r}"
    return "the loss or a gradient (every layer's output is finite)"
