"""The contract of a task.

A task turns a batch into a model's inputs and says which predictions count, what each is worth and
how far it is from another model's.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kdq.fields import ConfigError
from kdq.tasks.metric import Metric
from kdq.types import Array, Batch

Scalar = Array | float
Values = Mapping[str, float]  # a metric's name -> its value

# Energy of the difference of outputs over that of the outputs: the inverse of their SQNR.
NOISE = Metric(
    name="noise",
    scores=("noise", "signal"),
    of_mean=lambda noise, signal: noise / signal,
    higher_is_better=False,
    decimals=4,
    relative=True,
    tie=1.0,
)


class Task(Protocol):
    """The contract of a task: frozen, hashable, without data; a static argument of jit.

    Outputs are a model's prediction, [batch, outputs], or [batch, positions, outputs].
    """

    name: str  # of its module in kdq.tasks
    # The first is the primary one: it selects checkpoints, ranks arms and heads the report. The
    # next ones decide between equals. The first is a function of means: a step of training, which
    # has only sums over its batch, logs it too.
    metrics: tuple[Metric, ...]
    fidelity: tuple[Metric, ...]  # metrics of `divergence`: how a model follows its teacher
    keys: tuple[str, ...]  # of the batch: the model's positional arguments
    target: str  # of the batch: what is predicted
    unit: str = ""  # of the targets, for reports
    # Whether outputs are logits of one distribution over their last axis, which the losses of
    # kdq.distill.losses and their temperatures are made for.
    categorical: bool = False
    # Losses on outputs that this task adds to those: name -> (student's outputs, teacher's outputs,
    # batch, **options) -> the shape of `weights`. Options are annotated with their limits.
    distillation: Mapping[str, Callable[..., Array]] = {}
    # The loss by which a teacher is followed where nothing else is said.
    natural_distillation: str = "kl"
    loss_options: tuple[str, ...] = ()  # keywords of `loss` that an arm may set: data, no constants
    probes: tuple[str, ...] = ()  # modules of kdq.evaluate that look at more than scores

    @property
    def primary(self) -> Metric:
        """The first of the metrics."""
        return self.metrics[0]

    def with_facts(self, facts: Mapping[str, Any]) -> "Task":
        """Returns the task with what it has to know of the training split.

        Such facts of the data are "class_names"; "target_mean" and "target_std", [outputs].
        """
        return self

    def target_facts(self, read_targets: Callable[[], np.ndarray]) -> dict[str, Any]:
        """Returns the facts that this task needs of the training split's targets.

        Args:
          read_targets: returns these, [n] or [n, outputs]; reads the whole split.
        """
        return {}

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """Returns the model's positional arguments."""
        return tuple(batch[key] for key in self.keys)

    def weights(self, batch: Batch) -> Array:
        """Returns 1 for each prediction that counts, else 0: [batch] or [batch, positions].

        By default each example is one, and counts unless a mask hides it.
        """
        return count_all(batch, batch[self.target].shape[:1])

    def examples(self, batch: Batch) -> Array | None:
        """Returns the example of each prediction, int: [batch], or the shape of `weights`.

        Examples are what a test split was drawn of: all positions of a document are one, and two
        documents in a row are two. None: each row is one, by its place.
        """
        return batch.get("id")

    def loss(self, outputs: Array, batch: Batch, **options: Scalar) -> Array:
        """Returns the loss of each prediction; the shape of `weights`."""

    def scores(self, outputs: Array, batch: Batch) -> dict[str, Array]:
        """Returns scores of each prediction: the shape of `weights`, or with an axis of outputs."""

    def divergence(self, outputs: Array, reference: Array) -> dict[str, Array]:
        """Returns how far each prediction is from another model's, in the shapes of scores."""

    def describe_outputs(self) -> dict[str, Any]:
        """Returns the "meaning" of outputs and what undoes it, for the manifest of an export."""
        return {"meaning": "logits"}

    def problems(
        self, batch: Batch, facts: Mapping[str, Any], outputs: jax.ShapeDtypeStruct | None
    ) -> Iterator[str]:
        """Yields what of labels, facts and outputs does not fit; see `check`.

        What follows the first may rely on the rest.
        """

    def check(
        self, batch: Batch, facts: Mapping[str, Any], outputs: jax.ShapeDtypeStruct | None = None
    ) -> None:
        """Checks that labels, the data's facts and the model's outputs fit each other.

        Args:
          batch: a batch, or the labels of a whole split, on the host.
          facts: as in `with_facts`.
          outputs: of the model for that batch; None if there is no model yet.

        Raises:
          ConfigError: in one line, the first that does not.
        """
        for problem in self.problems(batch, facts, outputs):
            raise ConfigError(f"task {self.name}: {problem}")


def count_all(batch: Batch, shape: tuple[int, ...]) -> Array:
    """Returns weights of predictions [batch] or [batch, positions]: 0 where a mask hides them.

    A batch may have "mask" [batch] and "token_mask" [batch, positions].
    """
    weights = jnp.ones(shape, jnp.float32)
    for key, rank in (("mask", 1), ("token_mask", 2)):
        if key in batch and rank <= len(shape):
            mask = jnp.asarray(batch[key], jnp.float32)
            weights *= mask.reshape(mask.shape + (1,) * (len(shape) - rank))
    return weights


def improves(task: Task, values: Values, reference: Values) -> bool:
    """Returns whether values are better by the first of the task's metrics that differs."""
    for metric in task.metrics:
        if metric.name not in values or metric.name not in reference:
            continue  # top-5 accuracy of three classes
        a, b = values[metric.name], reference[metric.name]
        if metric.better(a, b) or metric.better(b, a):
            return metric.better(a, b)
    return False


def weighted_sum(values: Array, weights: Array) -> tuple[Array, Array]:
    """Returns `(sum of weights * values, sum of weights)` of one loss or score.

    Each term of an objective reduces itself so, with weights of its own shape: means of means, and
    values [batch] against weights [batch, positions], would be wrong without an error.

    What weighs 0 may be inf or nan. ValueError for different shapes.
    """
    if values.shape != weights.shape:
        raise ValueError(
            f"expected values and weights of one shape, got {values.shape} and {weights.shape}"
        )
    weights = weights.astype(jnp.float32)
    counted = jnp.where(weights > 0, values, 0).astype(jnp.float32)
    return jnp.sum(weights * counted), jnp.sum(weights)


def noise_and_signal(outputs: Array, reference: Array) -> dict[str, Array]:
    """Returns "noise" and "signal" of outputs [..., outputs] for `NOISE`, each [...] float32.

    An output that the reference rules out, by a logit of −inf, is no part of either.
    """
    possible = ~jnp.isneginf(reference)
    signal = jnp.where(possible, reference, 0).astype(jnp.float32)
    noise = jnp.where(possible, outputs, 0).astype(jnp.float32) - signal
    return {"noise": jnp.sum(noise**2, -1), "signal": jnp.sum(signal**2, -1)}
