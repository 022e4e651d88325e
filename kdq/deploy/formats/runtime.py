"""A file as a function of a batch, whatever runtime runs it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq.quantize.inputs import Batch, Inputs, as_inputs


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A loaded file. Called with a batch it returns an array, or a tuple of all that there are.

    Outputs are in the order of `jax.tree.leaves`.
    """

    run: Callable[[Inputs], Any]  # of NumPy arrays; returns a pytree
    # The "inputs" and "outputs" as the runtime has them: names, shapes, dtypes; None: no names.
    signature: dict[str, list[dict[str, Any]]] | None = None

    def __call__(self, inputs: Batch) -> Any:
        outputs = jax.tree.leaves(self.run(jax.tree.map(np.asarray, as_inputs(inputs))))
        arrays = tuple(np.asarray(array) for array in outputs)
        return arrays[0] if len(arrays) == 1 else arrays


def example_specs(inputs: Batch, batch: Any) -> Inputs:
    """Returns the shapes and dtypes of inputs, whose leading axes become `batch` examples."""
    spec = lambda x: jax.ShapeDtypeStruct((batch, *jnp.shape(x)[1:]), jnp.result_type(x))
    return jax.tree.map(spec, as_inputs(inputs))


def any_batch() -> Any:
    """Returns the size of a batch of any size, for `example_specs`."""
    return jax.export.symbolic_shape("batch")[0]


def flatten_inputs(
    function: Callable[[Inputs], Any], specs: Inputs
) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """Returns a function of arrays alone that calls `function`, and what arrays it takes."""
    leaves, structure = jax.tree.flatten(specs)
    return lambda *arrays: function(jax.tree.unflatten(structure, arrays)), leaves
