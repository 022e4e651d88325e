"""Classification of examples, or of each position of a text: one label among several classes."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq import entropy
from kdq.tasks import base
from kdq.tasks.base import Scalar
from kdq.tasks.metric import Metric
from kdq.types import Array, Batch

ACCURACY = Metric(name="accuracy", scores=("correct",), unit="%")
NLL = Metric(
    name="nll",
    scores=("nll",),
    unit="nats",
    higher_is_better=False,
    decimals=3,
    relative=True,
    tie=1.0,
)
TOP5 = Metric(name="top5_accuracy", scores=("top5",), unit="%")
BRIER = dataclasses.replace(NLL, name="brier", scores=("brier",), unit="", decimals=4)
AGREEMENT = Metric(name="agreement", scores=("agreement",), unit="%")
KL = dataclasses.replace(NLL, name="kl_to_teacher", scores=("kl",), decimals=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(base.Task):
    """Softmax over classes: labels [batch] or [batch, positions] int, outputs [..., classes].

    A class whose logit is −inf is ruled out, as in `kdq.distill.losses`: its probability is 0, it
    counts for nothing, and a label of such a class has a loss of +inf.
    """

    keys: tuple[str, ...] = ("image",)  # of the batch: the model's positional arguments
    target: str = "label"  # of the batch

    name = "classification"
    metrics = (ACCURACY, NLL)
    fidelity = (AGREEMENT, KL, base.NOISE)
    categorical = True
    loss_options = ("label_smoothing",)
    probes = ("classification", "attribution", "boundary", "cka")

    def weights(self, batch: Batch) -> Array:
        """Returns 1 for each label that no mask hides, else 0: the shape of the labels."""
        return base.count_all(batch, batch[self.target].shape)

    def loss(self, outputs: Array, batch: Batch, label_smoothing: Scalar = 0.0) -> Array:
        """Returns the cross-entropy in nats; see `kdq.entropy.cross_entropy`."""
        return entropy.cross_entropy(
            outputs.astype(jnp.float32), batch[self.target], label_smoothing
        )

    def scores(self, outputs: Array, batch: Batch) -> dict[str, Array]:
        """Returns scores of each prediction, float32 of the shape of the labels.

        "nll" in nats; "correct", 1 where the first of the largest logits is the label's, 0 where a
        logit is NaN; "confidence", the probability of the predicted class; "brier", Σ (p − y)²;
        "predicted" and "label", the classes; of more than 5 classes "top5", 1 where the label is
        among the 5 largest, of equal logits the lower class first.
        """
        logits, label = outputs.astype(jnp.float32), batch[self.target]
        probability = jax.nn.softmax(logits)
        is_label = entropy.one_hot(label, logits.shape)
        valid = ~jnp.isnan(logits).any(-1)
        predicted = jnp.argmax(logits, axis=-1)
        scores = {
            "nll": entropy.cross_entropy(logits, label),
            "correct": valid & (predicted == label),
            "confidence": jnp.max(probability, axis=-1),
            "brier": jnp.sum((probability - is_label) ** 2, axis=-1),
            "predicted": predicted,
            "label": label,
        }
        classes = logits.shape[-1]
        if classes > 5:
            # The label's rank, by logits of its own class: gathered, as it may be −inf.
            of_label = jnp.max(jnp.where(is_label, logits, -jnp.inf), axis=-1, keepdims=True)
            before = jnp.arange(classes) < jnp.expand_dims(label, -1)
            ahead = (logits > of_label) | ((logits == of_label) & before)
            scores["top5"] = valid & (jnp.sum(ahead, axis=-1) < 5)
        return {name: jnp.asarray(value, jnp.float32) for name, value in scores.items()}

    def divergence(self, outputs: Array, reference: Array) -> dict[str, Array]:
        """Returns "kl" of the reference's distribution p to q, KL(p ‖ q) in nats, and "agreement".

        Agreement is 1 where both predict one class, 0 where either has a NaN (fidelity,
        arXiv:2106.05945). With `base.noise_and_signal`.
        """
        q, p = outputs.astype(jnp.float32), reference.astype(jnp.float32)
        valid = ~(jnp.isnan(p) | jnp.isnan(q)).any(-1)
        agreement = valid & (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1))
        return {
            "kl": entropy.relative_entropy(jax.nn.log_softmax(p), jax.nn.log_softmax(q)),
            "agreement": agreement.astype(jnp.float32),
            **base.noise_and_signal(q, p),
        }

    def problems(
        self, batch: Batch, facts: Mapping[str, Any], outputs: jax.ShapeDtypeStruct | None
    ) -> Iterator[str]:
        """Yields a problem unless labels are classes, and outputs have a logit of each class.

        Labels that a mask hides may be anything.
        """
        labels = np.asarray(batch[self.target])
        if not np.issubdtype(labels.dtype, np.integer):
            yield (
                f"expected integer labels in {self.target!r}, got {labels.dtype} {labels.shape}; "
                "floats are labels of multilabel or regression"
            )
        classes = len(facts.get("class_names", ())) or None
        if outputs is not None:
            if outputs.shape[:-1] != labels.shape or outputs.shape[-1] < 2:
                yield (
                    f"expected outputs {(*labels.shape, classes or 'classes')} of at least 2 "
                    f"classes, got {outputs.shape}"
                )
            if classes not in (None, outputs.shape[-1]):
                yield f"the data has {classes} classes, the model {outputs.shape[-1]} outputs"
            classes = outputs.shape[-1]
        counted = labels[np.asarray(self.weights(batch)) > 0]
        if classes and counted.size and not 0 <= counted.min() <= counted.max() < classes:
            yield f"expected labels in [0, {classes}), got {counted.min()} to {counted.max()}"


Task = Classification
