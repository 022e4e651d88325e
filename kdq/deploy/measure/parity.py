"""How alike they are: the simulation, the integer model, and a file in its own runtime."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq import quantize
from kdq.deploy.formats.packed import PackedModel
from kdq.deploy.lower.lowering import IntegerModel
from kdq.quantize import grid
from kdq.quantize.calls import ModuleCall
from kdq.quantize.network import Network, Weights
from kdq.types import Array


def of_outputs(outputs: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Of two arrays of outputs [examples, ..., classes]."""
    same = (outputs.argmax(-1) == expected.argmax(-1)).mean()
    return {
        "argmax_agreement": float(same),
        "max_logit_difference": float(np.abs(outputs - expected).max()),
    }


def leaves(outputs: Any) -> list[np.ndarray]:
    """All arrays of what a model returns, in the order of `jax.tree.leaves`."""
    return [np.asarray(array) for array in jax.tree.leaves(outputs)]


def of_all(outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> dict[str, float]:
    """Of all outputs of a model: the least agreement, and the largest difference."""
    each = [of_outputs(*pair) for pair in zip(outputs, expected, strict=True)]
    return {
        "argmax_agreement": min(entry["argmax_agreement"] for entry in each),
        "max_logit_difference": max(entry["max_logit_difference"] for entry in each),
    }


def of_integers(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> dict[str, Any]:
    """Of what layers take and make, by name: uint8 codes, and int32 sums.

    What the first has not is left out.
    """
    apart = {
        name: np.abs(np.asarray(ours[name]).astype(np.int64) - np.asarray(array))
        for name, array in theirs.items()
        if name in ours
    }
    codes = [array for name, array in apart.items() if ours[name].dtype == np.uint8]
    sums = [array for name, array in apart.items() if ours[name].dtype != np.uint8]
    largest = lambda arrays: max((int(array.max()) for array in arrays), default=0)
    count = sum(array.size for array in codes)
    return {
        "max_code_difference": largest(codes),
        "max_sum_difference": largest(sums),
        "codes_that_differ": sum(int((array > 0).sum()) for array in codes) / max(count, 1),
        "layers_that_differ": {
            name: float((array > 0).mean()) for name, array in apart.items() if array.any()
        },
    }


@jax.jit
def made(integer: IntegerModel, images: Array) -> dict[str, Array]:
    """What each integer layer takes and makes; see `IntegerModel.apply`."""
    found: dict[str, Array] = {}
    integer.apply(images, unroll=True, made=found)
    return found


def simulated(packed: PackedModel, integer: IntegerModel, images: Array) -> Any:
    """The outputs that a file in its runtime is compared with: those of the simulation.

    Its biases are those of the integer model, whatever the file's are.
    """
    variables = integer.simulated(packed.variables)
    return quantize.predict(packed.model, variables, packed.qparams, images)


def simulated_codes(packed: PackedModel, integer: IntegerModel, images: Array) -> dict[str, Array]:
    """What the simulation rounds the inputs of layers to, named as by `made`.

    It has the biases of the integer model (`IntegerModel.simulated`), as the packed files of arms
    have by themselves. Of layers in a stack nothing.
    """
    wanted = set(jax.eval_shape(made, integer, images))

    def simulate(variables: Any, qparams: Any, images: Array) -> dict[str, Array]:
        found: dict[str, Array] = {}

        def record(call: ModuleCall) -> Any:
            quantizers = qparams.get(call.path, {})
            name, calls = call.path, 1
            while any(f"{name}/{operand}" in found for operand in quantizers):
                calls += 1
                name = f"{call.path}#{calls}"
            for operand, x in call.operands.items():
                if f"{name}/{operand}" in wanted and operand in quantizers:
                    codes = grid.to_codes(x, quantizers[operand]) - quantizers[operand].qmin
                    found[f"{name}/{operand}"] = codes.astype(jnp.uint8)
            return call.run()

        Network(packed.model).run(Weights(variables=variables, qparams=qparams), images, record)
        return found

    variables = integer.simulated(packed.variables)
    return jax.jit(simulate)(variables, packed.qparams, images)
