"""The problem of a search: decisions with options, the costs of the options, and budgets.

A policy is one option of each decision. The first decision is the student (of one, if there is no
choice), so that widths and bits share a budget; then a decision for each layer's bits, and one for
each layer that may be distilled. Costs add up over decisions, given the student.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdq.fields import ConfigError

Policy = tuple[int, ...]  # the option of each decision

# Relative error allowed in sums of floats: all layers at 3 bits keep an average of 3.
ROUNDING = 1e-12


class InfeasibleError(ConfigError):
    """Budgets that no policy keeps; the message says which ones one would keep."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """One choice."""

    name: str  # "student", a layer's path, or "distill/" and the name of a term
    options: tuple[str, ...]  # arms; "W4A8"; "off" and "on"
    # Where each option is between the least and the most of it, [0, 1]: of a layer the bits of its
    # weights and of its inputs. An agent that acts with numbers means the option nearest to them.
    places: tuple[tuple[float, float], ...]
    kind: str = "bits"  # or "student", "distilled"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Arrays have the axes [students, decisions, options]; options past a decision's last are void.

    Raises:
      ConfigError: a budget of a metric without costs.
    """

    decisions: tuple[Decision, ...]
    valid: np.ndarray  # bool: the option exists, and keeps every limit on a single layer
    costs: Mapping[str, np.ndarray]  # {metric: float64}, zeros of void options
    constants: Mapping[str, np.ndarray]  # {metric: [students]}, costs of every policy
    limits: Mapping[str, float]  # {metric: at most}; only these are budgets
    features: np.ndarray  # [students, decisions, features] float32, about 0 to 1
    # What each option alone adds to the objective; and [students], the objective without any.
    sensitivity: np.ndarray | None = None
    base: np.ndarray | None = None
    # {(student, decision, option, decision, option): what both add beyond the sum of each}.
    pairs: Mapping[tuple[int, int, int, int, int], float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for metric in self.limits:
            if metric not in self.costs:
                raise ConfigError(f"budget {metric!r}: costs are known of {tuple(self.costs)}")

    @property
    def students(self) -> int:
        return len(self.decisions[0].options)

    @functools.cached_property
    def free(self) -> tuple[int, ...]:
        """The decisions with more than one option."""
        return tuple(i for i, d in enumerate(self.decisions) if len(d.options) > 1)

    @functools.cached_property
    def size(self) -> float:
        """The number of policies, within the budgets or not."""
        return float(np.prod(self.valid.sum(-1).astype(float), axis=-1).sum() / self.students)

    def total(self, policy: Sequence[int]) -> dict[str, float]:
        """Returns the cost of a policy by metric."""
        at = _places(policy)
        return {
            metric: float(self.constants[metric][policy[0]] + table[at].sum())
            for metric, table in self.costs.items()
        }

    def keeps(self, metric: str, total: Any) -> Any:
        """Returns which costs, a number or an array, are within a metric's limit."""
        limit = self.limits[metric]
        return total <= limit + ROUNDING * abs(limit)

    def feasible(self, policy: Sequence[int]) -> bool:
        """Returns if a policy keeps every limit."""
        total = self.total(policy)
        return bool(self.valid[_places(policy)].all()) and all(
            self.keeps(metric, total[metric]) for metric in self.limits
        )

    def predicted(self, policy: Sequence[int]) -> float:
        """Returns the objective by sensitivities: the base, each option's share, and the pairs."""
        chosen = set(enumerate(policy))
        value = self.base[policy[0]] + self.sensitivity[_places(policy)].sum()
        value += sum(
            v
            for (s, d, o, e, p), v in self.pairs.items()
            if s == policy[0] and (d, o) in chosen and (e, p) in chosen
        )
        return float(value)

    def describe(self, policy: Sequence[int]) -> dict[str, str]:
        """Returns a policy by names: {decision: option}."""
        return {d.name: d.options[o] for d, o in zip(self.decisions, policy, strict=True)}


def _places(policy: Sequence[int]) -> tuple:
    """Returns the index of a policy's options in an array [students, decisions, options]."""
    return policy[0], np.arange(len(policy)), np.asarray(policy)
