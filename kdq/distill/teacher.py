"""Who teaches: what stands behind the logits and features that a student is to match.

A teacher is a static, hashable object; what it computes with is an argument, never closed over.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdq.distill import capture
from kdq.distill.capture import Outputs
from kdq.types import Array, Batch


class Teacher(Protocol):
    """`(arguments, batch, layers) -> Outputs`, in evaluation mode."""

    def __call__(self, arguments: Any, batch: Batch, layers: Collection[str]) -> Outputs:
        """What the teacher says of the batch, with the features of `layers`."""


@dataclasses.dataclass(frozen=True)
class Model:
    """One network that does not change: a trained one, or one loaded from a packed file."""

    module: nn.Module

    def __call__(self, arguments: Any, batch: Batch, layers: Collection[str] = ()) -> Outputs:
        """`arguments`: {"variables", "qparams"}, the latter {} for a float network."""
        outputs, _ = capture.run(
            self.module,
            arguments["variables"],
            arguments["qparams"],
            batch["image"],
            layers,
        )
        return outputs


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """The weighted average of several networks' probabilities or logits."""

    modules: tuple[nn.Module, ...]
    average: str  # a key of AVERAGES

    def __call__(self, arguments: Any, batch: Batch, layers: Collection[str] = ()) -> Outputs:
        """`arguments`: {"members": one a module as for `Model`, "weights" [members]}."""
        if layers:
            raise ValueError(f"an ensemble has no layers of its own, asked for {sorted(layers)}")
        logits = [
            Model(module)(own, batch).logits.astype(jnp.float32)
            for module, own in zip(self.modules, arguments["members"], strict=True)
        ]
        weights = arguments["weights"] / jnp.sum(arguments["weights"])
        return Outputs(logits=AVERAGES[self.average](jnp.stack(logits), weights))


def _mean_logits(logits: Array, weights: Array) -> Array:
    return jnp.tensordot(weights, logits, 1)


def _mean_probability(logits: Array, weights: Array) -> Array:
    """The logarithm of the mean probability, which is a logit of it."""
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0, b=weights[:, None, None])


AVERAGES = {"logit": _mean_logits, "probability": _mean_probability}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Logits computed before, which the batch carries: "teacher_logits", or sparse targets."""

    def __call__(self, arguments: Any, batch: Batch, layers: Collection[str] = ()) -> Outputs:
        if layers:
            raise ValueError(f"stored logits have no features, asked for {sorted(layers)}")
        return Outputs(logits=batch.get("teacher_logits"))


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """The exponential moving average of the student's own weights (arXiv:1703.01780).

    Its weights are part of the training state: after each step `decay` of what they were, plus the
    rest of what the student's are. Batch statistics are the student's own.
    """

    module: nn.Module
    decay: float

    def __call__(self, arguments: Any, batch: Batch, layers: Collection[str] = ()) -> Outputs:
        """`arguments`: {"params", "model_state"}."""
        variables = {"params": arguments["params"], **arguments["model_state"]}
        return Model(self.module)({"variables": variables, "qparams": {}}, batch, layers)

    def follow(self, average: Any, params: Any, model_state: Any) -> Any:
        """The average after a step that ended with the student's `params` and `model_state`."""
        mix = lambda mean, new: self.decay * mean + (1 - self.decay) * new
        return {
            "params": jax.tree.map(mix, average["params"], params),
            "model_state": model_state,
        }


@dataclasses.dataclass(frozen=True)
class Peer:
    """A network that is trained at once and learns from the student as the student does from it.

    (Deep mutual learning, arXiv:1706.00384.) Its weights are part of the training state, and the
    step runs it in training mode.
    """

    module: nn.Module
