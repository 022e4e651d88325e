"""Values of a student's predictions on held-out examples, by which policies are compared.

The one place in the search that asks the task what a prediction is worth.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kdq.tasks import Metric, Task
from kdq.tasks.base import NOISE, weighted_sum
from kdq.tasks.metric import identity
from kdq.types import Array, Batch

# Less is better: the distance from the teacher, the task's loss, the error by its primary metric,
# and noise over signal of the outputs (the inverse of their SQNR). Of classification: nats to the
# teacher, nats to the labels, the share of wrong classes.
OBJECTIVES = ("kl", "loss", "error", "noise")

WORST = 1e9  # the score of what is not finite: more than any other's, and JSON has it

Scores = dict[str, np.ndarray]  # {objective: [policies]}
Sums = dict[str, dict[str, Array]]  # {objective: {score: its sum}}, and "count"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A batch of held-out examples, and the outputs that predictions are compared with."""

    batch: Batch  # with the task's keys and target; and "mask", 0 of padding
    teacher: Array  # [examples, ..., outputs]
    float_outputs: Array  # the same, of the student itself

    def rows(self, task: Task) -> np.ndarray:
        """Returns the places of the examples that count; not traced."""
        weights = np.asarray(task.weights(self.batch))
        return np.flatnonzero(weights.reshape(len(weights), -1).any(-1))


def distance(task: Task) -> Metric:
    """Returns the first metric of a task's fidelity of which less is better."""
    return next(metric for metric in task.fidelity if not metric.higher_is_better)


def sum_scores(task: Task, outputs: Array, held: HeldOut) -> Sums:
    """Returns sums over the predictions that count; outputs: [examples, ..., outputs]."""
    weights = task.weights(held.batch)
    add = partial(_weighted_sum, weights=weights)
    scores = task.scores(outputs, held.batch)
    from_teacher = task.divergence(outputs, held.teacher)
    from_float = task.divergence(outputs, held.float_outputs)
    return {
        "kl": {name: add(from_teacher[name]) for name in distance(task).scores},
        "loss": {"loss": add(task.loss(outputs, held.batch))},
        "error": {name: add(scores[name]) for name in task.primary.scores},
        "noise": {name: add(from_float[name]) for name in NOISE.scores},
        "count": {"count": jnp.sum(weights)},
    }


def _weighted_sum(values: Array, weights: Array) -> Array:
    """Returns the sum over predictions of values [predictions] or [predictions, outputs]."""
    if values.ndim == weights.ndim:
        return weighted_sum(values, weights)[0]
    return jax.vmap(lambda column: weighted_sum(column, weights)[0], in_axes=-1)(values)


def compute_scores(task: Task, sums: Sequence[Sums]) -> Scores:
    """Returns scores, [policies], from the sums over batches; `WORST` of what is not finite.

    Args:
      task: whose metrics they are.
      sums: of each batch, [policies] or [policies, outputs] each.
    """
    total = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), 0), *sums)
    count, policies = total["count"]["count"], range(len(total["count"]["count"]))

    def values(metric: Metric, sums: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns those of a metric, turned so that less is better."""
        if metric.higher_is_better and metric.of_mean is identity:  # without 1 - 0.7
            (hits,) = (sums[name] for name in metric.scores)
            return (count - hits) / count
        means = [[sums[name][i] / count[i] for name in metric.scores] for i in policies]
        value = np.array([metric.from_means(*each) for each in means])
        return 1 - value if metric.higher_is_better else value

    with np.errstate(divide="ignore", invalid="ignore"):
        scores = {
            "kl": values(distance(task), total["kl"]),
            "loss": total["loss"]["loss"] / count,
            "error": values(task.primary, total["error"]),
            "noise": total["noise"]["noise"] / total["noise"]["signal"],
        }
    return {name: np.where(np.isfinite(v), v, WORST) for name, v in scores.items()}


def mean_loss(task: Task, outputs: Array, held: HeldOut) -> Array:
    """Returns the mean of the task's loss over the predictions that count."""
    total, count = weighted_sum(task.loss(outputs, held.batch), task.weights(held.batch))
    return total / count


def curvature(task: Task, outputs: Array, change: Array) -> Array:
    """Returns the second derivative of the distance by `change`, of each prediction.

    The quadratic form of `change` [..., outputs] with the Hessian of the distance of outputs from
    themselves: of a divergence of distributions the Fisher matrix of the predictions. For a softmax
    p that is Var_p(change).
    """
    if task.categorical:
        p = jax.nn.softmax(outputs)
        mean = jnp.sum(p * change, -1, keepdims=True)
        return jnp.sum(p * jnp.square(change - mean), -1)

    def moved(share: Array) -> Array:
        scores = task.divergence(outputs + share * change, outputs)
        values = [scores[name] for name in distance(task).scores]
        return sum(jnp.sum(v.reshape(*outputs.shape[:-1], -1), -1) for v in values)

    slope = lambda share: jax.jvp(moved, (share,), (jnp.ones_like(share),))[1]
    return jax.jvp(slope, (jnp.float32(0),), (jnp.float32(1),))[1]


def sum_curvature(task: Task, outputs: Array, change: Array, held: HeldOut) -> Array:
    """Returns [2]: the sum of `curvature` over the predictions that count, and their number."""
    return jnp.stack(weighted_sum(curvature(task, outputs, change), task.weights(held.batch)))
