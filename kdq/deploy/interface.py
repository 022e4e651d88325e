"""The inputs and outputs of a model, for the manifest of what is exported."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kdq.quantize.inputs import as_inputs

# How Flax's layers read an array of so many axes.
LAYOUTS = {4: "NHWC", 5: "NDHWC"}


def describe(inputs: Any, outputs: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The "inputs" and "outputs" of a model, in the order in which a runtime has them.

    Each has a shape, whose first axis is "batch", and a dtype; images their layout, and what they
    were normalized by, `(pixel - mean) / std`, if the metadata of the packed file have it; an
    output its place in what the model returns, if that is no single array.

    Args:
      inputs: an array, or a tuple of arrays.
      outputs: arrays in any pytree.
      metadata: of a packed file.
    """
    taken = [_array(array) for array in as_inputs(inputs).args]
    data = metadata.get("data")
    normalization = isinstance(data, Mapping) and {k: data[k] for k in ("mean", "std") if k in data}
    for entry in taken:
        if entry["dtype"].startswith("float") and len(entry["shape"]) in LAYOUTS:
            entry["layout"] = LAYOUTS[len(entry["shape"])]
            if normalization:
                entry["normalization"] = normalization
    made = []
    for path, array in jax.tree_util.tree_leaves_with_path(outputs):
        made.append(_array(array) | ({"place": jax.tree_util.keystr(path)} if path else {}))
    return {"inputs": taken, "outputs": made}


def _array(array: Any) -> dict[str, Any]:
    return {"shape": ["batch", *np.shape(array)[1:]], "dtype": np.dtype(array.dtype).name}
