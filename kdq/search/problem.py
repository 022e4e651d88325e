"""The problem of a search: decisions with options, the costs of the options, and budgets.

A policy is one option of each decision. The first decision is the student (of one, if there is no
choice), so that widths and bits share a budget; then a decision for each layer's bits, and one for
each layer that may be distilled. Costs add up over decisions, given the student.
"""

import dataclasses
import decimal
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdq.fields import ConfigError
from kdq.search import programs

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

    Its integer programs are solved when first needed, and once.

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

    @functools.cached_property
    def reserve(self) -> Policy:
        """The policy that comes nearest to the limits, or keeps them with the most to spare."""
        return programs.nearest(self)

    @functools.cached_property
    def reserves(self) -> np.ndarray:
        """Ways to end well, [reserves, students, decisions] int: cheap ones by mixtures of metrics.

        While a policy is built, an option may be taken if one of these completes it within the
        limits. With one budget that loses nothing; with several a few policies at the very edge.
        """
        ways = [np.array([programs.nearest(self, s) for s in range(self.students)])]
        steps = (0.0, 0.25, 0.5, 0.75, 1.0)
        mixtures = itertools.product(steps, repeat=len(self.limits))
        for mixture in [m for m in mixtures if sum(m) == 1.0] or [()]:
            cost = np.zeros(self.valid.shape)
            for weight, (metric, limit) in zip(mixture, self.limits.items(), strict=True):
                cost += weight * self.costs[metric] / max(abs(limit), 1e-300)
            ways.append(np.where(self.valid, cost, np.inf).argmin(-1))
        return np.stack(ways)

    def check(self) -> None:
        """Raises InfeasibleError, with the nearest limits, if no policy keeps them."""
        if self.feasible(self.reserve):
            return
        total, budgets, nearest = self.total(self.reserve), [], []
        # Up to the six digits that a message shows, so that the budget it names is enough.
        up = decimal.Context(prec=6, rounding=decimal.ROUND_CEILING).create_decimal_from_float
        for metric, limit in self.limits.items():
            budgets.append(f"{metric} <= {limit:g}")
            nearest.append(f"{metric} <= {max(float(up(total[metric])), limit):g}")
        policy = ", ".join(f"{k}={v}" for k, v in self.describe(self.reserve).items())
        raise InfeasibleError(
            f"no policy keeps the budgets {', '.join(budgets)}; the nearest that one keeps: "
            f"{', '.join(nearest)} ({policy})"
        )

    def allowed(self, partial: Sequence[int], decision: int) -> np.ndarray:
        """Returns which options of an open decision may be taken, [options] bool.

        At least one may, if each option before was allowed. `partial` has -1 for open decisions;
        the student is the first to be decided.
        """
        count = len(self.decisions[decision].options)
        tried = np.repeat(np.asarray(partial)[None], count, axis=0)
        tried[:, decision] = np.arange(count)
        student = tried[:, 0]
        # [reserves, options, decisions]: each option, completed in each way.
        whole = np.where(tried[None] < 0, self.reserves[:, student], tried[None])
        at = (student[None, :, None], np.arange(len(self.decisions)), whole)
        keeps = self.valid[at].all(-1)
        for metric in self.limits:
            total = self.constants[metric][student] + self.costs[metric][at].sum(-1)
            keeps &= self.keeps(metric, total)
        return keeps.any(0)

    def projected(self, policy: Sequence[int], order: Sequence[int] | None = None) -> Policy:
        """Returns a policy that keeps the limits: itself, or option by option the nearest to it.

        `order` is that of the decisions after the student: those that come late get what is left.
        """
        if self.feasible(policy):
            return tuple(int(option) for option in policy)
        partial = np.full(len(self.decisions), -1)
        for i in (0, *(order if order is not None else range(1, len(partial)))):
            allowed = np.flatnonzero(self.allowed(partial, i))
            places = np.asarray(self.decisions[i].places)
            away = np.square(places[allowed] - places[policy[i]]).sum(-1)
            partial[i] = allowed[away.argmin()]
        return tuple(partial.tolist())


def _places(policy: Sequence[int]) -> tuple:
    """Returns the index of a policy's options in an array [students, decisions, options]."""
    return policy[0], np.arange(len(policy)), np.asarray(policy)
