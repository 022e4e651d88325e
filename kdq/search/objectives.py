"""Values of a student's predictions on held-out examples, by which policies are compared.

The one place in the search that knows what a prediction is: logits of classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdq.distill.losses import cross_entropy
from kdq.quantize.ptq.divergence import kl
from kdq.types import Array

# Less is better: nats to the teacher, nats to the labels, share of wrong classes, and noise over
# signal of the logits (the inverse of their SQNR).
OBJECTIVES = ("kl", "loss", "error", "noise")

WORST = 1e9  # the score of what is not finite: more than any other's, and JSON has it

Scores = dict[str, np.ndarray]  # {objective: [policies]}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A batch of held-out examples, and the outputs that predictions are compared with."""

    images: Array
    labels: Array  # [examples] int
    mask: Array  # [examples], 0 of padding
    teacher: Array  # [examples, classes] logits
    float_logits: Array  # [examples, classes], of the student itself


def sums_of(logits: Array, held: HeldOut) -> dict[str, Array]:
    """Returns sums over the examples that count; logits: [examples, classes]."""
    # A class that the student rules out, by a logit of −inf, is no part of the noise either.
    possible = ~jnp.isneginf(held.float_logits)
    signal = jnp.where(possible, held.float_logits, 0)
    each = {
        "kl": kl(held.teacher, logits),
        "loss": cross_entropy(logits, held.labels),
        "error": (logits.argmax(-1) != held.labels).astype(jnp.float32),
        "signal": jnp.square(signal).sum(-1),
        "noise": jnp.square(jnp.where(possible, logits, 0) - signal).sum(-1),
        "count": jnp.ones_like(held.mask),
    }
    return {name: jnp.sum(held.mask * value) for name, value in each.items()}


def means(sums: Sequence[Mapping[str, Array]]) -> Scores:
    """Returns scores from the sums over batches; `WORST` of what is not finite."""
    total = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), 0), *sums)
    over = {name: total["signal" if name == "noise" else "count"] for name in OBJECTIVES}
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = {name: total[name] / over[name] for name in OBJECTIVES}
    return {name: np.where(np.isfinite(v), v, WORST) for name, v in scores.items()}


def mean_loss(logits: Array, held: HeldOut) -> Array:
    """Returns the mean loss by labels of the examples that count."""
    return jnp.sum(held.mask * cross_entropy(logits, held.labels)) / jnp.sum(held.mask)


def fisher_variance(logits: Array, change: Array) -> Array:
    """Returns Var_p(change) of each example, [examples], with p the softmax of the logits.

    The quadratic form of `change` [examples, classes] with the Fisher matrix of the predictions.
    """
    p = jax.nn.softmax(logits)
    mean = jnp.sum(p * change, -1, keepdims=True)
    return jnp.sum(p * jnp.square(change - mean), -1)
