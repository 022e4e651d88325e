"""Regression: one or several real targets of each example."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq.fields import LARGEST, Limits, field
from kdq.tasks import base
from kdq.tasks.base import Scalar
from kdq.tasks.metric import Metric
from kdq.types import Array, Batch

RMSE = Metric(
    name="rmse",
    scores=("squared_error",),
    of_mean=lambda mean_square: np.mean(np.sqrt(mean_square)),
    higher_is_better=False,
    decimals=3,
    relative=True,
    tie=1.0,
)
MAE = dataclasses.replace(RMSE, name="mae", scores=("absolute_error",), of_mean=np.mean)
R2 = Metric(
    name="r2",
    scores=("squared_error", "target", "squared_target"),
    # The mean over targets of 1 − E[error²] / Var[target].
    of_mean=lambda error, target, square: np.mean(1 - error / (square - target * target)),
    decimals=3,
    tie=0.005,
    level=0.01,
)
DISTANCE = dataclasses.replace(RMSE, name="rmse_to_teacher", scores=("squared_difference",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(base.Task):
    """Real targets [batch] or [batch, targets] float in their own units, outputs [batch, targets].

    Outputs are of standardized targets, (target − mean) / std with the mean and standard deviation
    of the training split; losses are of these. Scores and metrics are in the targets' own units;
    of several targets, a metric is the mean of each target's, as in scikit-learn.
    """

    keys: tuple[str, ...] = ("image",)  # of the batch: the model's positional arguments
    target: str = "label"  # of the batch
    error: str = field("squared", one_of=("squared", "huber"))  # what the loss is of the error
    delta: float = field(1.0, above=0)  # where Huber's loss becomes linear, of standardized errors
    unit: str = ""  # of the targets, for reports
    mean: tuple[float, ...] = ()  # of each target on the training split; see `with_facts`
    std: tuple[float, ...] = field((), at_least=1e-30, at_most=LARGEST)

    name = "regression"
    natural_distillation = "squared_error"
    probes = ("cka",)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """RMSE and MAE in the targets' unit, and R²."""
        return (*(dataclasses.replace(metric, unit=self.unit) for metric in (RMSE, MAE)), R2)

    @property
    def fidelity(self) -> tuple[Metric, ...]:
        """Distance from the teacher's outputs in the targets' unit, and noise over signal."""
        return dataclasses.replace(DISTANCE, unit=self.unit), base.NOISE

    @property
    def distillation(self) -> Mapping[str, Any]:
        """Losses on a teacher's outputs."""
        return {"squared_error": self.squared_error, "teacher_bounded": self.teacher_bounded}

    def target_facts(self, read_targets: Callable[[], np.ndarray]) -> dict[str, Any]:
        """Returns "target_mean" and "target_std" of the training split's targets, [targets]."""
        targets = np.asarray(read_targets(), np.float64)
        targets = targets.reshape(len(targets), -1)
        return {
            "target_mean": tuple(targets.mean(0).tolist()),
            "target_std": tuple(targets.std(0).tolist()),
        }

    def with_facts(self, facts: Mapping[str, Any]) -> "Regression":
        """Returns the task with "target_mean" and "target_std" of the facts, unless it has its own.

        A target that is constant is only shifted.
        """
        if self.mean or self.std or "target_mean" not in facts:
            return self
        std = tuple(float(x) or 1.0 for x in facts["target_std"])
        return dataclasses.replace(self, mean=tuple(map(float, facts["target_mean"])), std=std)

    def loss(self, outputs: Array, batch: Batch) -> Array:
        """Returns the mean over targets of e² or of Huber's loss of e, standardized: [batch].

        Huber's loss is e² where |e| ≤ δ, else 2 δ |e| − δ²: twice the usual one, so that small
        errors weigh as they do squared. (Huber, 1964, Robust Estimation of a Location Parameter.)
        """
        error = jnp.abs(outputs.astype(jnp.float32) - self._standardize(batch))
        near = error if self.error == "squared" else jnp.minimum(error, self.delta)
        return jnp.mean(near * (2 * error - near), axis=-1)

    def scores(self, outputs: Array, batch: Batch) -> dict[str, Array]:
        """Returns [batch, targets] float32 in the targets' own units, errors squared and absolute.

        "target" is the target less the training split's mean, and "squared_target" its square: R²
        has to know how much the targets vary.
        """
        standardized, std = self._standardize(batch), self._statistics()[1]
        error = (outputs.astype(jnp.float32) - standardized) * std
        target = standardized * std
        return {
            "squared_error": error**2,
            "absolute_error": jnp.abs(error),
            "target": target,
            "squared_target": target**2,
        }

    def divergence(self, outputs: Array, reference: Array) -> dict[str, Array]:
        """Returns "squared_difference" [batch, targets] in own units, and `noise_and_signal`."""
        difference = (outputs - reference).astype(jnp.float32) * self._statistics()[1]
        return {
            "squared_difference": difference**2,
            **base.noise_and_signal(outputs, reference),
        }

    def describe_outputs(self) -> dict[str, Any]:
        """Returns that outputs are standardized, and by what: target = output * std + mean."""
        mean, std = (statistic.tolist() for statistic in self._statistics())
        return {"meaning": "standardized targets", "mean": mean, "std": std, "unit": self.unit}

    def squared_error(self, student: Array, teacher: Array, batch: Batch) -> Array:
        """Returns the mean over targets of (student − teacher)², standardized: [batch]."""
        return jnp.mean(jnp.square(student - jax.lax.stop_gradient(teacher)), axis=-1)

    def teacher_bounded(
        self,
        student: Array,
        teacher: Array,
        batch: Batch,
        margin: Annotated[Scalar, Limits(at_least=0, at_most=LARGEST)] = 0.0,
    ) -> Array:
        """Returns the student's squared error, and 0 where it beats the teacher's by the margin.

        e_s where e_s + m > e_t, else 0, with e the mean over targets of squared standardized
        errors: the teacher is an upper bound that the student need not pass by more than m.
        (Chen et al., Learning Efficient Object Detection Models with Knowledge Distillation,
        NeurIPS 2017.)

        Outputs are [batch, targets] standardized, the result [batch] float32 and m ≥ 0 the margin,
        of squared standardized errors. No gradient flows to the teacher, nor by the comparison.
        """
        target = self._standardize(batch)
        error, bound = (
            jnp.mean(jnp.square(v.astype(jnp.float32) - target), axis=-1)
            for v in (student, jax.lax.stop_gradient(teacher))
        )
        return jnp.where(error + margin > bound, error, 0)

    def problems(
        self, batch: Batch, facts: Mapping[str, Any], outputs: jax.ShapeDtypeStruct | None
    ) -> Iterator[str]:
        """Yields a problem unless targets are finite floats, as many as there are outputs."""
        targets = np.asarray(batch[self.target])
        if not np.issubdtype(targets.dtype, np.floating) or targets.ndim not in (1, 2):
            yield (
                f"expected float targets [batch] or [batch, targets] in {self.target!r}, got "
                f"{targets.dtype} {targets.shape}; integers are labels of classification"
            )
        if bad := np.sum(~np.isfinite(targets)):
            yield f"expected finite targets, got {bad} that are not"
        count = targets.shape[1] if targets.ndim == 2 else 1
        for statistic in ("mean", "std"):
            values = getattr(self, statistic) or facts.get(f"target_{statistic}", ())
            if len(values) not in (0, count):
                yield f"{count} targets an example, and {statistic} of {len(values)}"
        if outputs is not None and outputs.shape != (len(targets), count):
            yield f"expected outputs {(len(targets), count)}, one a target, got {outputs.shape}"

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        mean, std = self.mean or (0.0,), self.std or (1.0,)
        return np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def _standardize(self, batch: Batch) -> Array:
        """Returns the targets, [batch, targets] float32 of mean 0 and deviation 1 in training."""
        targets = jnp.asarray(batch[self.target], jnp.float32)
        mean, std = self._statistics()
        return (targets.reshape(len(targets), -1) - mean) / std


Task = Regression
