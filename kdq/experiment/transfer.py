"""What of its teacher a student has become: layers, attributions and decision boundaries."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq import quantize
from kdq.distill import capture
from kdq.evaluate import attribution, boundary, cka
from kdq.schema import Transfer
from kdq.train.loop import Weights
from kdq.types import Array


def measure(
    student: tuple[nn.Module, Weights],
    teacher: tuple[nn.Module, Weights],
    images: np.ndarray,
    config: Transfer,
) -> dict[str, Any]:
    """Compares two networks on some images; takes seconds.

    Args:
      student: the module and what it computes with.
      teacher: the same.
      images: [n, height, width, channels], normalized.
      config: how.

    Returns:
      "cka": {layer of the student: {layer of the teacher: value}}, with maps averaged over
      positions; "attribution_cosine" and "attribution_rank" (integrated gradients towards the
      teacher's class); "path_agreement"; "adversarial_agreement" after a step of `config.epsilon`
      against the teacher. None for what can't be said of these two.
    """
    fns = [_logits(*one) for one in (student, teacher)]
    layers = cka.layer_cka(
        _features(*student, images), _features(*teacher, images), reduce=cka.global_average
    )
    matrix: dict[str, dict[str, float | None]] = {}
    for (own, other), value in layers.items():
        matrix.setdefault(own, {})[other] = _number(value)
    attributions = attribution.attribution_similarity(*fns, images, batch_size=len(images))
    found = {
        "attribution_cosine": attributions["cosine"],
        "attribution_rank": attributions["rank_correlation"],
        "adversarial_agreement": boundary.adversarial_agreement(
            *fns, images, config.epsilon, batch_size=len(images)
        )["against_teacher"],
    }
    predicted = np.asarray(jax.jit(fns[1])(images)).argmax(-1)
    if len(np.unique(predicted)) > 1:  # there is a path between two classes
        found["path_agreement"] = boundary.path_agreement(*fns, images, pairs=config.pairs)
    names = ("attribution_cosine", "attribution_rank", "path_agreement", "adversarial_agreement")
    return {"cka": matrix, **{name: _number(found.get(name, np.nan)) for name in names}}


def _logits(model: nn.Module, weights: Weights):
    return lambda images: quantize.apply(
        model, weights.variables, weights.qparams, images, train=False
    )


def _features(model: nn.Module, weights: Weights, images: np.ndarray) -> Mapping[str, Array]:
    layers = capture.list_outputs(model, weights.variables, images, train=False)

    @jax.jit
    def run(variables, qparams, images):
        return capture.run(model, variables, qparams, images, layers, train=False)[0].features

    return run(weights.variables, weights.qparams, images)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
