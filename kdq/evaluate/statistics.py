"""What may be claimed from a few seeds: mean, spread, and paired intervals."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np
from scipy import special


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedInterval:
    """A mean difference over seeds with its confidence interval, in the unit of the values."""

    mean: float
    low: float  # nan for fewer than two seeds
    high: float  # nan for fewer than two seeds
    n: int  # seeds

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero; False where there is no interval."""
        return self.low > 0 or self.high < 0

    def __format__(self, spec: str) -> str:
        """Such as "+1.00 [+0.25, +1.75]"; `spec` is that of each number, "" for ".2f"."""
        mean, low, high = (
            format(value, f"+{spec or '.2f'}") for value in (self.mean, self.low, self.high)
        )
        return f"{mean} [{low}, {high}]"


def summary(values: Iterable[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (n − 1) of one value a seed.

    Returns:
      (mean, std); std is nan for one value, both are nan for none.
    """
    values = np.asarray(list(values), np.float64)
    mean = float(values.mean()) if values.size else math.nan
    return mean, float(values.std(ddof=1)) if values.size > 1 else math.nan


def paired_interval(
    a: Mapping[int, float], b: Mapping[int, float], confidence: float = 0.95
) -> PairedInterval:
    """Student-t interval of the mean of a − b, paired by seed.

    Two arms of one seed share their split, their batches and often their initialization, so the
    difference within a seed varies far less than either arm does.

    Args:
      a: seed -> value.
      b: seed -> value, for the same seeds.
      confidence: probability of covering the true mean if the differences are normal, in (0, 1).

    Raises:
      ValueError: different seeds, no seed, or a confidence outside (0, 1).
    """
    if set(a) != set(b):
        raise ValueError(f"paired_interval: seeds differ: {sorted(a)} and {sorted(b)}")
    if not a:
        raise ValueError("paired_interval: there are no seeds")
    if not 0 < confidence < 1:
        raise ValueError(f"paired_interval: confidence must be in (0, 1), given {confidence}")
    mean, std = summary(a[seed] - b[seed] for seed in sorted(a))
    n = len(a)
    # Student's t has no quantiles at 0 degrees of freedom: scipy gives nan, as std does.
    half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * std / math.sqrt(n)
    return PairedInterval(mean=mean, low=mean - half, high=mean + half, n=n)
