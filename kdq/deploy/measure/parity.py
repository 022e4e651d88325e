"""Differences between the simulation, the integer model, and a file in its own runtime."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq.deploy.formats.packed import PackedModel
from kdq.deploy.lower.model import IntegerModel
from kdq.quantize import grid
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Batch
from kdq.quantize.network import Weights
from kdq.tasks import Metric, Task, build
from kdq.tasks.base import NOISE
from kdq.types import Array, QParams, Variables

CLASSIFICATION = build("classification")


def compare_outputs(
    outputs: np.ndarray, expected: np.ndarray, task: Task = CLASSIFICATION
) -> dict[str, float]:
    """Compares two arrays of outputs [examples, ..., outputs] of a task.

    The agreement is a share of decisions: of the classes that have the largest logits, of the
    labels whose logits are above 0. Outputs that decide nothing, of regression, have one less their
    relative error, ‖outputs − expected‖ / ‖expected‖.
    """
    agreement = next((m for m in task.fidelity if m.higher_is_better), NOISE)
    scores = _divergence(task, agreement, outputs, expected)
    value = agreement.compute({name: np.ravel(score) for name, score in scores.items()})
    if agreement is NOISE:  # a share of energy; nan of outputs that all are 0, and equal
        value = 1 - math.sqrt(value) if np.any(outputs != expected) else 1.0
    return {
        "argmax_agreement": value,
        "max_logit_difference": float(np.abs(outputs - expected).max()),
    }


@partial(jax.jit, static_argnames=("task", "metric"))
def _divergence(task: Task, metric: Metric, outputs: Array, expected: Array) -> dict[str, Array]:
    divergence = task.divergence(outputs, expected)
    return {name: divergence[name] for name in metric.scores}


def leaves(outputs: Any) -> list[np.ndarray]:
    """Returns all arrays that a model returns, in the order of `jax.tree.leaves`."""
    return [np.asarray(array) for array in jax.tree.leaves(outputs)]


def compare_all(
    outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray], task: Task = CLASSIFICATION
) -> dict[str, float]:
    """Compares all outputs of a model; returns the least agreement and the largest difference."""
    each = [compare_outputs(*pair, task) for pair in zip(outputs, expected, strict=True)]
    return {
        "argmax_agreement": min(entry["argmax_agreement"] for entry in each),
        "max_logit_difference": max(entry["max_logit_difference"] for entry in each),
    }


def compare_integers(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> dict[str, Any]:
    """Compares what layers take and make, by name: uint8 codes, and int32 sums.

    Names that `ours` lacks are left out.
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
def layer_integers(integer: IntegerModel, inputs: Batch) -> dict[str, Array]:
    """Returns what each integer layer takes and makes; see `IntegerModel.apply`."""
    integers: dict[str, Array] = {}
    integer.apply(inputs, unroll=True, integers=integers)
    return integers


def simulated_codes(packed: PackedModel, integer: IntegerModel, inputs: Batch) -> dict[str, Array]:
    """Returns what the simulation, with the biases of the integer model, rounds layers' inputs to.

    They are named as by `layer_integers`. Layers in a stack are left out.
    """
    names = set(jax.eval_shape(layer_integers, integer, inputs))

    def simulate(variables: Variables, qparams: QParams, inputs: Batch) -> dict[str, Array]:
        codes: dict[str, Array] = {}

        def record(call: ModuleCall) -> Any:
            quantizers = qparams.get(call.path, {})
            name, calls = call.path, 1
            while any(f"{name}/{operand}" in codes for operand in quantizers):
                calls += 1
                name = f"{call.path}#{calls}"
            for operand, x in call.operands.items():
                if f"{name}/{operand}" in names and operand in quantizers:
                    rounded = grid.to_codes(x, quantizers[operand]) - quantizers[operand].qmin
                    codes[f"{name}/{operand}"] = rounded.astype(jnp.uint8)
            return call.run()

        packed.network.run(Weights(variables=variables, qparams=qparams), inputs, record)
        return codes

    return jax.jit(simulate)(integer.simulated(packed.variables), packed.qparams, inputs)
