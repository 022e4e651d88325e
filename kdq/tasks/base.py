"""The contract of a task, and `Metric`: the one place that knows percent, points and units.

A task turns a batch into a model's inputs and says which predictions count, what each is worth and
how far it is from another model's. A metric turns the scores of predictions into one value, says
how values and differences are shown, and which of two is better.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from kdq.fields import ConfigError
from kdq.types import Array, Batch

Scalar = Array | float
Values = Mapping[str, float]  # a metric's name -> its value
# A score's name -> [predictions], or [predictions, outputs] where a prediction has several outputs
# that are measured one by one: labels of multilabel, targets of regression.
ScoreArrays = Mapping[str, ArrayLike]

_STEP = 1e-30  # of a complex-step derivative, which has no difference that would cancel


def identity(mean: float) -> float:
    """Returns the mean of a score, where that is the metric."""
    return mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A function of the means of some scores; hashable.

    A value is a plain number: an accuracy is in [0, 1] wherever it is computed or stored. Only
    here does it become 97.25 of "%" and a difference 1.25 "points".
    """

    name: str  # in records: "accuracy"
    scores: tuple[str, ...]  # whose means over predictions it is computed from
    # (mean of each score: a number, or [outputs]) -> the value. An analytic NumPy expression, for
    # it is differentiated with a complex step: no abs, max or comparison of the means' parts.
    of_mean: Callable[..., Any] = identity
    unit: str = ""  # "%": shown times 100; or "nats", "mg/dl"
    higher_is_better: bool = True
    decimals: int = 2  # shown of a value and of a difference
    # Differences are percents of the reference's value, not differences of the shown values.
    relative: bool = False
    tie: float = 0.5  # largest difference, as shown, of two that rank alike
    level: float = 1.0  # largest end, as shown, of an interval that says "no difference"

    # Values.

    def compute(self, scores: ScoreArrays) -> float:
        """Returns the value over all predictions, in float64; nan of none.

        Args:
          scores: those that `self.scores` names, and any others.
        """
        arrays = self._arrays(scores)
        return self.from_means(*(x.mean(0) for x in arrays)) if len(arrays[0]) else math.nan

    def from_means(self, *means: ArrayLike) -> float:
        """Returns the value from the mean of each score, in the order of `self.scores`."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return float(self.of_mean(*means))

    def contributions(self, scores: ScoreArrays) -> np.ndarray:
        """Returns what each prediction adds to the value: [predictions] float64.

        Their mean is the value, and their deviations from it are its influence function: what the
        value changes by, times the number of predictions, when one counts a little more (the
        infinitesimal jackknife; Efron, 1982, chapter 6). For a plain mean they are the scores.
        """
        arrays = self._arrays(scores)
        means = [x.mean(0) for x in arrays]
        total = np.full(len(arrays[0]), self.from_means(*means))
        for i, x in enumerate(arrays):
            for place in np.ndindex(means[i].shape):
                # f'(m) = Im f(m + ih) / h, exact to rounding.
                shifted = [np.asarray(mean, np.complex128) for mean in means]
                shifted[i][place] += 1j * _STEP
                with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                    slope = np.imag(self.of_mean(*shifted)) / _STEP
                total += slope * (x[(slice(None), *place)] - means[i][place])
        return total

    def _arrays(self, scores: ScoreArrays) -> list[np.ndarray]:
        return [np.asarray(scores[name], np.float64) for name in self.scores]

    # What is shown.

    @property
    def heading(self) -> str:
        """Such as "accuracy (%)"."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def difference_unit(self) -> str:
        """The unit of `difference`: "points" between percents, "%" of relative ones."""
        if self.relative:
            return "%"
        return "points" if self.unit == "%" else self.unit

    def shown(self, value: float) -> float:
        """Returns a value in the unit that it is shown in."""
        return 100 * value if self.unit == "%" else value

    def number(self, value: float) -> str:
        """Returns a value as it is shown, without its unit: "97.25"."""
        return f"{self.shown(value):.{self.decimals}f}"

    def text(self, value: float) -> str:
        """Returns a value with its unit, for a sentence: "97.25%", "54.30 mg/dl"."""
        return self.number(value) + _suffix(self.unit)

    def difference_number(self, difference: float) -> str:
        """Returns what `difference` returned, with its sign: "+1.25"."""
        return f"{difference:+.{self.decimals}f}"

    def difference_text(self, difference: float) -> str:
        """Returns the same with its unit, for a sentence: "+1.25 points", "-3.10%"."""
        return self.difference_number(difference) + _suffix(self.difference_unit)

    # What is compared.

    def difference(self, value: float, reference: float) -> float:
        """Returns value - reference, in `difference_unit`: points, or percents of the reference."""
        if not self.relative:
            return self.shown(value) - self.shown(reference)
        if reference == 0:
            return 0.0 if value == 0 else math.copysign(math.inf, value)
        return 100 * (value - reference) / abs(reference)

    def difference_contributions(self, values: ArrayLike, references: ArrayLike) -> np.ndarray:
        """Returns what each prediction adds to the difference of two models' values.

        Args:
          values: [predictions], `contributions` of a model.
          references: [predictions], those of the reference, of the same predictions.

        Returns:
          [predictions] float64 in `difference_unit`. Their mean is `difference` of the means.
        """
        a, b = np.asarray(values, np.float64), np.asarray(references, np.float64)
        if not self.relative:
            return self.shown(a) - self.shown(b)
        mean_a, mean_b = a.mean(), b.mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = (a - mean_a) / abs(mean_b) - mean_a * (b - mean_b) / (mean_b * abs(mean_b))
        return self.difference(float(mean_a), float(mean_b)) + 100 * slope

    def gain(self, value: float, reference: float) -> float:
        """Returns the difference, positive where `value` is the better one."""
        difference = self.difference(value, reference)
        return difference if self.higher_is_better else -difference

    def better(self, value: float, reference: float) -> bool:
        """Returns whether a value is better than another; any number is better than nan."""
        if math.isnan(value) or math.isnan(reference):
            return math.isnan(reference) and not math.isnan(value)
        return value > reference if self.higher_is_better else value < reference

    def ties(self, value: float, reference: float) -> bool:
        """Returns whether two values rank alike: they differ by at most `tie`."""
        return abs(self.difference(value, reference)) <= self.tie


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
    # Whether outputs are logits of one distribution over their last axis, which the losses of
    # kdq.distill.losses and their temperatures are made for.
    categorical: bool = False
    # Losses on outputs that this task adds to those: name -> (student's outputs, teacher's outputs,
    # batch, **options) -> the shape of `weights`. Options are annotated with their limits.
    distillation: Mapping[str, Callable[..., Array]] = {}
    loss_options: tuple[str, ...] = ()  # keywords of `loss` that an arm may set: data, no constants
    probes: tuple[str, ...] = ()  # modules of kdq.evaluate that look at more than scores

    @property
    def primary(self) -> Metric:
        """The first of the metrics."""
        return self.metrics[0]

    def with_facts(self, facts: Mapping[str, Any]) -> "Task":
        """Returns the task with what it has to know of the training split.

        Args:
          facts: of the data: "class_names"; "target_mean" and "target_std", [outputs].
        """
        return self

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """Returns the model's positional arguments."""
        return tuple(batch[key] for key in self.keys)

    def weights(self, batch: Batch) -> Array:
        """Returns 1 for each prediction that counts, else 0: [batch] or [batch, positions]."""

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


def count_all(batch: Batch, shape: tuple[int, ...]) -> Array:
    """Returns weights of predictions of a shape: 0 where a mask of the batch hides them.

    Args:
      batch: may have "mask" [batch] and "token_mask" [batch, positions].
      shape: (batch,) or (batch, positions).
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

    Args:
      values: [...] float; what weighs 0 may be inf or nan.
      weights: the same shape.

    Raises:
      ValueError: different shapes.
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


def require(condition: bool, task: Task, message: str) -> None:
    """Raises ConfigError with the task's name in front unless a condition holds."""
    if not condition:
        raise ConfigError(f"task {task.name}: {message}")


def _suffix(unit: str) -> str:
    return unit if unit in ("", "%") else f" {unit}"
