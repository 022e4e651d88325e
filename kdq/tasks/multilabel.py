"""Multi-label classification: which of several labels hold, each a decision of its own."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from kdq import entropy
from kdq.fields import Limits
from kdq.schema import COLD, HOT
from kdq.tasks import base, classification
from kdq.tasks.base import Scalar
from kdq.tasks.metric import Metric, ScoreArrays
from kdq.types import Array, Batch


def _f1(hit: Any, false_alarm: Any, miss: Any) -> Any:
    """Returns 2 TP / (2 TP + FP + FN), and 0 of a label that is never there nor predicted."""
    total = 2 * hit + false_alarm + miss
    return 2 * hit / np.where(total == 0, 1, total)


class AveragePrecision(Metric):
    """Mean over labels of the average precision Σ (R_k − R_{k−1}) P_k: no function of means.

    A label that no example has is left out: it has no precision. Examples of one score enter
    together, as in scikit-learn. It keeps the logits of each label, which here are the predictions;
    no bins, so that the value is exact and each example's influence is known.
    """

    def from_means(self, *means: ArrayLike) -> float:
        """Raises TypeError: the ranks of the examples are not in their means."""
        raise TypeError(f"{self.name} is no function of means: compute it from the scores")

    def compute(self, scores: ScoreArrays) -> float:
        """Returns the value over all examples; nan of none, or where a logit is NaN."""
        contributions = self.contributions(scores)
        return float(contributions.mean()) if len(contributions) else float("nan")

    def contributions(self, scores: ScoreArrays) -> np.ndarray:
        """Returns each example's, [examples] float64; see `Metric.contributions`.

        With weights w, the average precision of a label is Σ_i w_i y_i P_i / Σ_i w_i y_i, where the
        precision P_i = Σ_j w_j y_j [s_j ≥ s_i] / N_i and N_i = Σ_j w_j [s_j ≥ s_i]. Its derivative
        by w_m at w = 1 is (y_m (P_m − AP) + Σ_i y_i [s_i ≤ s_m] (y_m − P_i) / N_i) / Σ y.
        """
        logits, hit, miss = self._arrays(scores)
        if np.isnan(logits).any() or not len(logits):
            return np.full(len(logits), np.nan)
        present = (hit + miss) > 0
        columns = []
        for label in np.flatnonzero(present.any(0)):
            y = present[:, label]
            # Distinct scores in descending order: those of one score share a threshold.
            _, group, count = np.unique(-logits[:, label], return_inverse=True, return_counts=True)
            positives = np.bincount(group, y, len(count))
            above = np.cumsum(count)  # N of each threshold
            precision = np.cumsum(positives) / above
            total = positives.sum()
            value = np.sum(positives * precision) / total
            # Sums over the thresholds at and below each.
            suffix = lambda terms: np.cumsum(terms[::-1])[::-1]
            share, shared = suffix(positives / above), suffix(positives * precision / above)
            slope = y * (precision[group] - value) + y * share[group] - shared[group]
            columns.append(value + len(y) / total * slope)
        return np.mean(columns, axis=0) if columns else np.full(len(logits), np.nan)


MEAN_AVERAGE_PRECISION = AveragePrecision(
    name="mean_average_precision", scores=("logit", "hit", "miss"), unit="%"
)
MICRO_F1 = Metric(
    name="micro_f1",
    scores=("hit", "false_alarm", "miss"),
    of_mean=lambda *means: _f1(*map(np.sum, means)),
    unit="%",
)
MACRO_F1 = dataclasses.replace(
    MICRO_F1, name="macro_f1", of_mean=lambda *means: np.mean(_f1(*means))
)


def bernoulli_kl(
    student: Array,
    teacher: Array,
    batch: Batch,
    temperature: Annotated[Scalar, Limits(at_least=COLD, at_most=HOT)] = 1.0,
) -> Array:
    """Returns T² times the mean over labels of KL(p ‖ q) of Bernoulli distributions.

    p = σ(teacher / T), q = σ(student / T); nats at T = 1. T² keeps the size of the gradient when T
    changes, as in `kdq.distill.losses.kl`. A mean over labels, as the loss is one: the weight of
    the term does not depend on their number. (Multi-label logits distillation, arXiv:2308.06453,
    which sums over labels, at T = 1.)

    Logits are [..., labels], the result [...] float32; no gradient flows to the teacher.
    """
    pair = [v.astype(jnp.float32) / temperature for v in (jax.lax.stop_gradient(teacher), student)]
    log_p, log_q = (
        jnp.stack([jax.nn.log_sigmoid(v), jax.nn.log_sigmoid(-v)], axis=-1) for v in pair
    )
    return jnp.square(temperature) * jnp.mean(entropy.relative_entropy(log_p, log_q), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multilabel(base.Task):
    """A sigmoid a label: labels [batch, labels] float of 0 and 1, outputs [batch, labels] logits.

    A logit of −inf rules a label out, +inf makes it certain.
    """

    keys: tuple[str, ...] = ("image",)  # of the batch: the model's positional arguments
    target: str = "label"  # of the batch

    name = "multilabel"
    metrics = (MICRO_F1, classification.NLL, MACRO_F1, MEAN_AVERAGE_PRECISION)
    fidelity = (classification.AGREEMENT, classification.KL, base.NOISE)
    distillation = {"bernoulli_kl": bernoulli_kl}  # noqa: RUF012 (of the contract, read only)
    natural_distillation = "bernoulli_kl"
    loss_options = ("label_smoothing",)
    probes = ("cka",)

    def loss(self, outputs: Array, batch: Batch, label_smoothing: Scalar = 0.0) -> Array:
        """Returns the mean over labels of −y log σ(z) − (1 − y) log σ(−z) in nats: [batch].

        y is (1 − ε) label + ε / 2, with ε the label smoothing in [0, 1].
        """
        logits = outputs.astype(jnp.float32)
        y = (1 - label_smoothing) * batch[self.target] + label_smoothing / 2
        value = entropy.times_log(y, jax.nn.log_sigmoid(logits))
        value += entropy.times_log(1 - y, jax.nn.log_sigmoid(-logits))
        return -jnp.mean(value, axis=-1)

    def scores(self, outputs: Array, batch: Batch) -> dict[str, Array]:
        """Returns "nll" [batch], and [batch, labels] float32 of each decision.

        "hit" is 1 where a label is there and predicted (its logit is above 0), "false_alarm" where
        it is only predicted, "miss" where it is only there; "logit" is what it was predicted by.
        """
        logits, label = outputs.astype(jnp.float32), batch[self.target] > 0.5
        predicted = logits > 0
        return {
            "nll": self.loss(outputs, batch),
            "logit": logits,
            "hit": (predicted & label).astype(jnp.float32),
            "false_alarm": (predicted & ~label).astype(jnp.float32),
            "miss": (~predicted & label).astype(jnp.float32),
        }

    def divergence(self, outputs: Array, reference: Array) -> dict[str, Array]:
        """Returns [batch] float32: "kl", see `bernoulli_kl`, and "agreement", a share of labels.

        With `base.noise_and_signal`.
        """
        valid = ~(jnp.isnan(outputs) | jnp.isnan(reference))
        agreement = valid & ((outputs > 0) == (reference > 0))
        return {
            "kl": bernoulli_kl(outputs, reference, {}),
            "agreement": jnp.mean(agreement.astype(jnp.float32), axis=-1),
            **base.noise_and_signal(outputs, reference),
        }

    def problems(
        self, batch: Batch, facts: Mapping[str, Any], outputs: jax.ShapeDtypeStruct | None
    ) -> Iterator[str]:
        """Yields a problem unless labels are floats 0 and 1, [batch, labels], and outputs fit."""
        labels = np.asarray(batch[self.target])
        if not np.issubdtype(labels.dtype, np.floating) or labels.ndim != 2:
            yield (
                f"expected float labels [batch, labels] in {self.target!r}, got {labels.dtype} "
                f"{labels.shape}; integers are labels of classification"
            )
        neither = labels[~np.isin(labels, (0, 1))]
        if neither.size:
            yield f"expected labels 0 and 1, got {neither[:1].tolist()}"
        names = facts.get("class_names", ())
        if len(names) not in (0, labels.shape[1]):
            yield f"the data names {len(names)} labels, each example has {labels.shape[1]}"
        if outputs is not None and outputs.shape != labels.shape:
            yield f"expected outputs {labels.shape}, one a label, got {outputs.shape}"


Task = Multilabel
