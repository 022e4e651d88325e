"""Where NaN or infinity came from."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from kdq import quantize
from kdq.distill.capture import Outputs
from kdq.train.state import TrainState
from kdq.train.streams import with_streams
from kdq.types import Array, Batch


class NonFiniteError(RuntimeError):
    """Training met NaN or infinity."""


def _finite(tree: Any) -> Array:
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all() if leaves else jnp.bool_(True)


def first_nonfinite(
    model: nn.Module, state: TrainState, batch: Batch, teacher: Outputs | None
) -> str:
    """The first place, in the order of the forward pass, that holds NaN or infinity, in words."""
    if not _finite(batch["image"]):
        return "the input images"
    if not _finite(teacher):
        return "what the teacher says"
    finite: dict[str, dict[str, Array]] = {}
    trained: dict[str, list[Array]] = {}
    for (*layer, _), leaf in traverse_util.flatten_dict(state.params).items():
        trained.setdefault("/".join(layer), []).append(leaf)

    def watch(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        if context.method_name == "__call__":
            path = "/".join(context.module.path)
            # Those that train as well: rounding clips infinity.
            own = context.module.variables.get("params", {}), trained.get(path)
            finite.setdefault(path, {"parameters": _finite(own), "output": _finite(outputs)})
        return outputs

    def forward(rngs: dict[str, Array]) -> None:
        quantize.apply(
            model,
            state.variables,
            state.quantizers,
            batch["image"],
            train=True,
            mutable=list(state.model_state),
            rngs=rngs,
        )

    with nn.intercept_methods(watch):
        with_streams(forward, jax.random.fold_in(jax.random.key(state.seed), state.step))
    for path, parts in finite.items():
        for part, is_finite in parts.items():
            if not is_finite:
                return f"the {part} of layer {path!r}" if path else f"the model's {part}"
    for name, params in state.adapters.items():
        if not _finite(params):
            return f"the adapter of term {name!r}"
    return "the loss or a gradient (every layer's output is finite)"
