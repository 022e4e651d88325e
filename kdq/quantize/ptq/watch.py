"""What post-training methods share: seeing what modules return, and refusing what is no data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax

from kdq.quantize import kinds, simulate
from kdq.quantize.layers import LayerInfo, as_args, at_path, path_of
from kdq.types import Array, QParams, Variables

T = TypeVar("T")
# Wraps a loop under a description, as `kdq.data.progress.track` does with a length.
Progress = Callable[[Iterable[T], str], Iterable[T]]
# What to keep of an output of a module.
Take = Callable[[Array], Any]

TAKEN = "_taken"


def quiet(items: Iterable[T], description: str) -> Iterable[T]:
    """The progress that shows nothing."""
    return items


def first_of(batches: Sequence[Array | tuple], method: str) -> Array | tuple:
    """The first batch. Raises ValueError if there is none, or they can be read only once."""
    if iter(batches) is batches:
        raise ValueError(f"{method} reads its batches several times: want a list, not an iterator")
    first = next(iter(batches), None)
    if first is None:
        raise ValueError(f"{method} got no batches: want at least one")
    return first


def static(apply_kwargs: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """`apply_kwargs` as a hashable argument of a `jit`."""
    return tuple(sorted((apply_kwargs or {}).items()))


def outputs_of(
    model: nn.Module,
    variables: Variables,
    qparams: QParams,
    inputs: Array | tuple,
    takes: Mapping[str, Take],
    apply_kwargs: Mapping[str, Any],
) -> tuple[Any, dict[str, tuple[Any, ...]]]:
    """The model's output, and what `takes` keep of the outputs of layers; to be called in a `jit`.

    Args:
      model: any Linen module.
      variables: its float variables.
      qparams: quantizers that are at work; {} for the float model.
      inputs: one batch.
      takes: what to keep, by layer path.
      apply_kwargs: passed to the model.

    Returns:
      `(output, {path: (what was kept of the first call, of the second, ...)})`; of a stack of
      layers with its axes in front.
    """

    def watch(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        outputs = next_fun(*args, **kwargs)
        module, path = context.module, path_of(context.module)
        kind = kinds.kind_of(module)
        if path in takes and kind is not None and context.method_name in kind.methods:
            before = module.get_variable("params", TAKEN) if _has(module, TAKEN) else ()
            module.put_variable("params", TAKEN, (*before, takes[path](outputs)))
        return outputs

    # Under "params", the collection that lifted transforms slice and stack: see `observe`.
    with nn.intercept_methods(watch):
        outputs, changed = simulate.apply(
            model, variables, qparams, inputs, mutable=["params"], **apply_kwargs
        )
    return outputs, {path: at_path(changed["params"], path)[TAKEN] for path in takes}


def _has(module: nn.Module, name: str) -> bool:
    return module.has_variable("params", name)


def output_channels(layer: LayerInfo) -> dict[int, int]:
    """{axis of a layer's output: the axis of its weight that makes it}, both negative, ascending.

    A bias has these axes in this order. Empty for a layer without output channels of its own
    (Embed, a product), and an Einsum whose equation is given with the call.
    """
    rank, weight_rank = len(layer.output_shape), len(layer.weight_shape)
    if layer.kind in ("Dense", "Conv", "ConvTranspose"):
        return {-1: layer.channel_axes[0]}
    if layer.kind == "DenseGeneral":
        batch = _size(layer.module.batch_dims)
        features = _size(layer.module.features)
        leading = {i - rank: i - weight_rank for i in range(batch)}
        return leading | {-i: -i for i in range(features, 0, -1)}
    if layer.kind == "Einsum" and layer.module.einsum_str is not None:
        terms, output = layer.module.einsum_str.replace(" ", "").split("->")
        kernel = terms.split(",")[1]
        before, _, after = output.partition("...")
        axes = {label: i - rank for i, label in enumerate(before)}
        axes |= {label: i - len(after) for i, label in enumerate(after)}
        return {axes[k]: kernel.index(k) - weight_rank for k in output if k in kernel and k != "."}
    return {}


def _size(dimensions: int | Sequence[int]) -> int:
    return len(dimensions) if isinstance(dimensions, Sequence) else 1


def stack_roots(
    model: nn.Module, variables: Variables, inputs: Array | tuple, apply_kwargs: Mapping[str, Any]
) -> list[str]:
    """Paths of the modules whose parameters a lifted transform slices; outermost of each first."""
    sliced: list[str] = []

    def record(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        path = path_of(context.module)
        own = context.module.variables.get("params", {})
        if simulate.has_path(variables["params"], path):
            shapes = [a.shape for a in jax.tree.leaves(own)]
            whole = [a.shape for a in jax.tree.leaves(at_path(variables["params"], path))]
            # Some calls of lifted transforms are made on a module that has nothing yet.
            if shapes and shapes != whole and not any(_inside(path, root) for root in sliced):
                sliced.append(path)
        return next_fun(*args, **kwargs)

    def forward(variables: Variables, *args: Any) -> Any:
        with nn.intercept_methods(record):
            return model.apply(variables, *args, **apply_kwargs)

    jax.eval_shape(forward, variables, *as_args(inputs))
    return sliced


def _inside(path: str, root: str) -> bool:
    return root in ("", path) or path.startswith(root + "/")


def root_of(path: str, roots: Sequence[str]) -> str | None:
    """The root, of `stack_roots`, that a layer is in; None if it is in no stack."""
    return next((root for root in roots if _inside(path, root)), None)
