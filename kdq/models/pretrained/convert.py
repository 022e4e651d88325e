"""Weights that another library trained, as the variables of a Flax network."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kdq.fields import Mistake
from kdq.types import Variables

# A pattern of names and what a match becomes, as in `re.sub`; None: the arrays are left out.
Rule = tuple[str, str | None]

# Last parts of PyTorch's names -> collection and candidates in Flax, by what the network has.
_LEAVES = {
    "weight": ("params", ("kernel", "scale", "embedding")),
    "bias": ("params", ("bias",)),
    "running_mean": ("batch_stats", ("mean",)),
    "running_var": ("batch_stats", ("var",)),
}
# Counts of training steps of batch norms, which have a fixed momentum.
_IGNORED = re.compile(r"(^|\.)num_batches_tracked$")


class ConversionError(Mistake, ValueError):
    """Arrays that do not fit a network; the message names them."""


def convert(
    network: nn.Module,
    inputs: Any,
    tensors: Mapping[str, np.ndarray],
    rules: Sequence[Rule] = (),
) -> Variables:
    """Returns the variables of a network, filled with arrays of PyTorch's names and layouts.

    A name like "features.0.weight" is changed by each rule in turn, its dots then lead to a module
    and its end to an array: "weight" to a kernel, scale or embedding, "bias" to a bias,
    "running_mean" and "running_var" to the statistics of a batch norm. Kernels are transposed:
    [out, in] to [in, out], [out, in, *window] to [*window, in, out].

    Args:
      network: any Linen module.
      inputs: an array that it is called with, or its shape; one example will do.
      tensors: by name; see `read_tensors`.
      rules: (pattern, replacement), applied to names by `re.sub`; a replacement of None leaves the
        arrays that match out.

    Returns:
      The variables, in the dtypes that the network has.

    Raises:
      ConversionError: an array that the network has no place for, a place without an array, two
        arrays for one place, or an array of another shape.
    """
    shaped = jax.eval_shape(network.init, jax.random.key(0), inputs)
    places = traverse_util.flatten_dict(nn.meta.unbox(shaped), sep="/")
    filled: dict[str, Any] = {}
    surplus, misshapen = [], []
    for name, array in tensors.items():
        renamed = _rename(name, rules)
        if renamed is None:
            continue
        path = _find_place(renamed, places)
        if path is None:
            surplus.append(f"{name} {array.shape}")
            continue
        if path in filled:
            raise ConversionError(f"{name}: {path} has been filled from another array")
        value = _transpose(np.asarray(array), path)
        if value.shape != places[path].shape:
            misshapen.append(f"{name} {array.shape} for {path} {places[path].shape}")
        filled[path] = value
    missing = [f"{path} {places[path].shape}" for path in places if path not in filled]
    problems = {
        "of another shape": misshapen,
        "that the network has no place for": surplus,
        "of the network that nothing fills": missing,
    }
    if any(problems.values()):
        raise ConversionError(
            "; ".join(f"arrays {kind}: {_list(names)}" for kind, names in problems.items() if names)
        )
    arrays = {path: jnp.asarray(filled[path], places[path].dtype) for path in places}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _rename(name: str, rules: Sequence[Rule]) -> str | None:
    """Returns the name after all rules; None if it is left out."""
    if _IGNORED.search(name):
        return None
    for pattern, replacement in rules:
        if replacement is None:
            if re.search(pattern, name):
                return None
        else:
            name = re.sub(pattern, replacement, name)
    return name


def _find_place(name: str, places: Mapping[str, Any]) -> str | None:
    """Returns the path in the variables that a name of PyTorch's leads to."""
    *modules, leaf = name.split(".")
    collection, candidates = _LEAVES.get(leaf, ("params", (leaf,)))
    paths = ["/".join([collection, *modules, candidate]) for candidate in candidates]
    return next((path for path in paths if path in places), None)


def _transpose(array: np.ndarray, path: str) -> np.ndarray:
    """Returns a kernel [out, in, *window] as [*window, in, out]; other arrays as they are."""
    if not path.endswith("/kernel"):
        return array
    return array.transpose((*range(2, array.ndim), 1, 0))


def _list(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
