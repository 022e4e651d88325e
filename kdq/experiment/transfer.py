"""Measures of transfer from teacher to student: layers, attributions, decision boundaries."""

import math
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import numpy as np

from kdq.distill import capture
from kdq.evaluate import attribution, boundary, cka
from kdq.quantize.network import Network, Weights, as_network
from kdq.schema import Transfer
from kdq.types import Array


class Predictor(flax.struct.PyTreeNode):
    """Images -> logits. Its weights are leaves, so predictors of one structure share programs."""

    weights: Weights
    network: Network | nn.Module = flax.struct.field(pytree_node=False)

    def __call__(self, images: Array) -> Array:
        return as_network(self.network).apply(self.weights, images)


class Comparison:
    """Measures of a teacher, taken once, to compare any number of students with it.

    `images` are [n, height, width, channels], normalized; `probes` the modules of kdq.evaluate that
    can look at models of the task.
    """

    def __init__(
        self, teacher: Predictor, images: np.ndarray, config: Transfer, probes: Collection[str]
    ) -> None:
        self._images, size = images, len(images)
        self._features = _averaged(teacher, images)
        self._explanation = None
        if not {"attribution", "boundary"} <= set(probes):  # there are no classes
            return
        self._explanation = attribution.Explanation(teacher, images, batch_size=size)
        moved = boundary.adversarial_images(teacher, images, config.epsilon, batch_size=size)
        self._adversarial = boundary.probe_images(teacher, moved, batch_size=size)
        self._paths = None
        if len(np.unique(self._explanation.logits.argmax(-1))) > 1:  # a path between two classes
            self._paths = boundary.probe_paths(teacher, images, pairs=config.pairs)

    def measure(self, student: Predictor) -> dict[str, Any]:
        """Returns how a student compares with the teacher; NaN for what can't be said of the two.

        That is "cka": {layer of the student: {layer of the teacher: value}}, with maps averaged
        over positions; "attribution_cosine" and "attribution_rank" (integrated gradients towards
        the teacher's class); "path_agreement"; "adversarial_agreement" after a step of
        `config.epsilon` against the teacher. Without classes "cka" alone.
        """
        matrix: dict[str, dict[str, float]] = {}
        layers = cka.layer_cka(_averaged(student, self._images), self._features)
        for (layer, other), value in layers.items():
            matrix.setdefault(layer, {})[other] = value
        if not self._explanation:
            return {"cka": matrix}
        attributions = self._explanation.similarity(student)
        return {
            "cka": matrix,
            "attribution_cosine": attributions["cosine"],
            "attribution_rank": attributions["rank_correlation"],
            "path_agreement": self._paths.agreement(student) if self._paths else math.nan,
            "adversarial_agreement": self._adversarial.agreement(student),
        }


def _averaged(predictor: Predictor, images: np.ndarray) -> dict[str, np.ndarray]:
    """{layer: [n, channels]} of every layer that can be captured."""
    return {k: cka.global_average(v) for k, v in _features(predictor, images).items()}


@jax.jit
def _features(predictor: Predictor, images: Array) -> dict[str, Array]:
    network, weights = predictor.network, predictor.weights
    layers = capture.list_outputs(network, weights.variables, images)
    outputs, _ = capture.run(network, weights.variables, weights.qparams, images, layers)
    return outputs.features
