"""The inputs and outputs of a model, for the manifest of what is exported."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kdq.quantize.inputs import Batch, as_inputs

# How Flax's layers read an array of so many axes.
LAYOUTS = {4: "NHWC", 5: "NDHWC"}


def describe(inputs: Batch, outputs: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the "inputs" and "outputs" of a model, in the order in which a runtime has them.

    Each has a shape, whose first axis is "batch", and a dtype; images their layout, and what they
    were normalized by, `(pixel - mean) / std`, if the metadata of the packed file have it; an
    output its place in what the model returns, if that is no single array.

    Args:
      inputs: of one batch.
      outputs: arrays in any pytree.
      metadata: of a packed file.
    """
    data = metadata.get("data")
    normalization = isinstance(data, Mapping) and {k: data[k] for k in ("mean", "std") if k in data}
    input_entries = [_describe(array) for array in jax.tree.leaves(as_inputs(inputs))]
    for entry in input_entries:
        if entry["dtype"].startswith("float") and len(entry["shape"]) in LAYOUTS:
            entry["layout"] = LAYOUTS[len(entry["shape"])]
            if normalization:
                entry["normalization"] = normalization
    output_entries = []
    for path, array in jax.tree_util.tree_leaves_with_path(outputs):
        place = {"place": jax.tree_util.keystr(path)} if path else {}
        output_entries.append(_describe(array) | place)
    return {"inputs": input_entries, "outputs": output_entries}


def _describe(array: Any) -> dict[str, Any]:
    return {"shape": ["batch", *np.shape(array)[1:]], "dtype": np.dtype(array.dtype).name}
