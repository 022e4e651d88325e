"""`Metric`, the one place that knows percent, points and units, without JAX.

A metric turns the scores of predictions into one value, says how values and differences are shown,
and which of two is better.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

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
        """Returns the value over all predictions, in float64; nan of none."""
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

        Of the `contributions` of both to the same predictions: [predictions] float64 in
        `difference_unit`. Their mean is `difference` of the means.
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


def _suffix(unit: str) -> str:
    return unit if unit in ("", "%") else f" {unit}"
