"""Compares variables with those of a model: names, shapes and dtypes of all arrays."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq import quantize
from kdq.quantize.inputs import Batch, Inputs, as_inputs
from kdq.quantize.network import Network
from kdq.types import Array, QParams, Variables

# Collections in which an infinity is as bad as NaN; others may hold masks.
FINITE = ("params", "batch_stats")


class MisfitError(ValueError):
    """Variables that are not a model's; the message says which array."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """An array that a model takes, as a packed file states it."""

    shape: tuple[int, ...]
    dtype: str


def describe(inputs: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the fields of `Input` of each positional argument. Raises ValueError for others."""
    for argument in inputs:
        if not hasattr(argument, "shape") or not hasattr(argument, "dtype"):
            kind = type(argument).__name__
            raise ValueError(f"inputs: expected an array or a tuple of arrays, got a {kind}")
    return [
        {"shape": list(argument.shape), "dtype": jnp.dtype(argument.dtype).name}
        for argument in inputs
    ]


def read(inputs: Sequence[Input]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns what `describe` described. Raises ValueError for what is no array."""
    structs = []
    for i, argument in enumerate(inputs):
        if any(not 0 <= axis < 2**31 for axis in argument.shape):
            raise ValueError(f"inputs[{i}].shape={argument.shape}: expected sizes")
        try:
            dtype = jnp.dtype(argument.dtype)
        except TypeError as error:
            raise ValueError(f"inputs[{i}].dtype={argument.dtype!r}: {error}") from error
        structs.append(jax.ShapeDtypeStruct(argument.shape, dtype))
    return tuple(structs)


def check_finite(variables: Variables) -> None:
    """Raises ValueError for an array with NaN, or one of weights or statistics with an infinity."""
    for path, leaf in _with_paths(variables):
        if not jnp.issubdtype(getattr(leaf, "dtype", None), jnp.inexact):
            continue
        values = np.asarray(leaf)
        values = values.astype(np.float32) if values.dtype.itemsize < 4 else values
        is_bad = ~np.isfinite(values) if path.split("/")[0] in FINITE else np.isnan(values)
        if is_bad.any():
            raise ValueError(f"{path} holds {values[is_bad].flat[0]}: expected finite numbers")


def check(network: Network, variables: Variables, qparams: QParams, inputs: Batch) -> None:
    """Compares names, shapes and dtypes of all arrays with the model's own.

    Arrays may have another precision than the model's where both are floats, as networks that were
    cast have; those of collections that a model makes in training alone may be there or not. Of
    `inputs` only shapes and dtypes matter. Raises MisfitError for another model's variables or
    quantizers, or inputs that the model does not take.
    """
    call = jax.eval_shape(lambda call: call, as_inputs(inputs))
    leaves = _leaves(variables)
    expected = _leaves(_initial(network, call, len(leaves), train=False))
    for path in expected:
        if path not in leaves:
            raise MisfitError(f"there is no {path}, which the model has")
    if leaves.keys() - expected.keys():
        expected = _leaves(_initial(network, call, 2 * len(leaves), train=True)) | expected
    for path, leaf in leaves.items():
        if path not in expected:
            raise MisfitError(f"{path} is none of the model's arrays")
        pair = (leaf.dtype, expected[path].dtype)
        same_kind = pair[0] == pair[1] or all(jnp.issubdtype(d, jnp.floating) for d in pair)
        if leaf.shape != expected[path].shape or not same_kind:
            raise MisfitError(
                f"{path} is {_text(leaf)}, the model's {_text(expected[path])}"
                + _OF_OLD * (leaf.shape == (1,) and expected[path].shape == ())
            )
    predict = lambda *args: quantize.predict(network, *args)
    _traced("compute with", call, predict, variables, qparams, call)


_EVERY, _MOST_CALLS = 200, 100_000  # calls of modules between two looks, and in all
_OF_OLD = "; a file of an older kdq, which lost the shape of scalars: pack the model again"


def _initial(network: Network, call: Inputs, most: int, *, train: bool) -> Any:
    """Returns the shapes of the variables that a model begins with, so many arrays at most.

    It stops there: a model with a depth of 10**9 would take days.
    """
    calls = 0

    def counted(next_fun: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % _EVERY == 0 and context.module.scope is not None:
            arrays = len(jax.tree.leaves(nn.meta.unbox(context.module.scope.root.variables())))
            if arrays > most or calls > _MOST_CALLS:
                raise MisfitError(
                    f"the model makes more than {most} arrays, or {_MOST_CALLS} calls of modules"
                )
        return next_fun(*args, **kwargs)

    def init(key: Array, call: Inputs) -> Any:
        with nn.intercept_methods(counted):
            return network.init(key, call, train=train)

    return _traced("begin with", call, init, jax.random.key(0), call)


def _traced(does: str, call: Inputs, function: Any, *args: Any) -> Any:
    try:
        return jax.eval_shape(function, *args)
    except MisfitError:
        raise
    except Exception as error:  # whatever a model of anybody's raises
        reason = " ".join(str(error).split())[:300]
        taken = ", ".join(map(_text, jax.tree.leaves(call)))
        raise MisfitError(
            f"the model can't {does} inputs {taken}: {type(error).__name__}: {reason}"
        ) from error


def _with_paths(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields leaves with their "/"-joined keys, arrays without their boxes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(tree))
    for path, leaf in leaves:
        keys = (str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        yield "/".join(keys), leaf


def _leaves(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes, as JAX has them, by the keys."""
    return dict(_with_paths(jax.eval_shape(lambda tree: tree, tree)))


def _text(array: jax.ShapeDtypeStruct) -> str:
    return f"{array.dtype}{list(array.shape)}"
