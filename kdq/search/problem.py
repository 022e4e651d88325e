"""What is searched: decisions with options, what each option costs, and budgets that hold.

A policy is one option of each decision. The first decision is the student (of one, if there is no
choice), so that widths and bits share a budget; then a decision for each layer's bits, and one for
each layer that may be distilled. Costs add up over decisions, given the student.
"""

import dataclasses
import decimal
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from kdq.fields import ConfigError
from kdq.search import programs

Policy = tuple[int, ...]  # the option of each decision

# What sums of floats may be off, relative: all layers at 3 bits keep an average of 3.
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
    """Arrays have the axes [students, decisions, options]; options past a decision's own are void.

    Invariants: `limits` hold for one policy at least (InfeasibleError otherwise).
    """

    decisions: tuple[Decision, ...]
    valid: np.ndarray  # bool: the option is there, and keeps every limit that is each layer's own
    costs: Mapping[str, np.ndarray]  # {metric: float64}, zeros of void options
    constants: Mapping[str, np.ndarray]  # {metric: [students]}, of whatever the policy
    limits: Mapping[str, float]  # {metric: at most}; only these are budgets
    features: np.ndarray  # [students, decisions, features] float32, about 0 to 1
    # What each option alone adds to the objective, and [students] what there is without any.
    sensitivity: np.ndarray | None = None
    base: np.ndarray | None = None
    # {(student, decision, option, decision, option): what both add beyond the sum of each}.
    pairs: Mapping[tuple[int, int, int, int, int], float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for metric in self.limits:
            if metric not in self.costs:
                raise ConfigError(f"budget {metric!r}: costs are known of {tuple(self.costs)}")
        if not self.feasible(self.reserve):
            raise InfeasibleError(self._nearest())

    @property
    def students(self) -> int:
        return len(self.decisions[0].options)

    @functools.cached_property
    def free(self) -> tuple[int, ...]:
        """The decisions with more than one option."""
        return tuple(i for i, one in enumerate(self.decisions) if len(one.options) > 1)

    @functools.cached_property
    def size(self) -> float:
        """How many policies there are, whether they keep the budgets or not."""
        return float(np.prod(self.valid.sum(-1).astype(float), axis=-1).sum() / self.students)

    def total(self, policy: Sequence[int]) -> dict[str, float]:
        """What a policy costs, by metric."""
        student, places = policy[0], (np.arange(len(policy)), np.asarray(policy))
        return {
            metric: float(self.constants[metric][student] + table[student][places].sum())
            for metric, table in self.costs.items()
        }

    def feasible(self, policy: Sequence[int]) -> bool:
        """Whether a policy keeps every limit."""
        student = policy[0]
        if not self.valid[student, np.arange(len(policy)), np.asarray(policy)].all():
            return False
        total = self.total(policy)
        return all(self._keeps(metric, total[metric]) for metric in self.limits)

    def predicted(self, policy: Sequence[int]) -> float:
        """The objective by sensitivities: the base, each option's share, and what pairs add."""
        student, places = policy[0], (np.arange(len(policy)), np.asarray(policy))
        value = self.base[student] + self.sensitivity[student][places].sum()
        chosen = set(enumerate(policy))
        value += sum(
            v
            for (s, d, o, e, p), v in self.pairs.items()
            if s == student and (d, o) in chosen and (e, p) in chosen
        )
        return float(value)

    @functools.cached_property
    def reserve(self) -> Policy:
        """The policy that comes nearest to the limits, or keeps them with the most to spare."""
        return programs.nearest(self)

    @functools.cached_property
    def reserves(self) -> np.ndarray:
        """Ways to end well, [reserves, students, decisions] int: cheap ones by mixtures of metrics.

        While an episode is built, an option may be taken if one of these completes it within the
        limits. With one budget that loses nothing; with several a few policies at the very edge.
        """
        found = []
        metrics = list(self.limits)
        steps = (0.0, 0.25, 0.5, 0.75, 1.0)
        mixtures = [m for m in itertools.product(steps, repeat=len(metrics)) if sum(m) == 1.0]
        for mixture in mixtures or [()]:
            cost = np.zeros(self.valid.shape)
            for weight, metric in zip(mixture, metrics, strict=True):
                cost += weight * self.costs[metric] / max(abs(self.limits[metric]), 1e-300)
            # What costs least in the mixture; of equals what costs least in all.
            cost = np.where(self.valid, cost, np.inf)
            found.append(cost.argmin(-1))
        own = [programs.nearest(self, student) for student in range(self.students)]
        return np.stack([np.array(own), *found])

    def allowed(self, partial: Sequence[int], decision: int) -> np.ndarray:
        """Which options of a decision may be taken, [options] bool.

        Never none, if each option before was allowed.

        Args:
          partial: the option of each decision, -1 where there is none yet. The student is the first
            to be decided.
          decision: an open one.
        """
        partial, count = np.asarray(partial), len(self.decisions[decision].options)
        tried = np.repeat(partial[None], count, axis=0)
        tried[:, decision] = np.arange(count)
        student = tried[:, 0]
        # [reserves, options, decisions]: each option, completed in each way.
        whole = np.where(tried[None] < 0, self.reserves[:, student], tried[None])
        at = (student[None, :, None], np.arange(len(self.decisions)), whole)
        keeps = self.valid[at].all(-1)
        for metric in self.limits:
            total = self.constants[metric][student] + self.costs[metric][at].sum(-1)
            keeps &= self._keeps(metric, total)
        return keeps.any(0)

    def projected(self, policy: Sequence[int], order: Sequence[int] | None = None) -> Policy:
        """A policy that keeps the limits: itself, or else option by option what is nearest to it.

        Args:
          policy: the options that are wanted.
          order: of the decisions after the student; those that come late get what is left.
        """
        if self.feasible(policy):
            return tuple(int(option) for option in policy)
        found = np.full(len(self.decisions), -1)
        for i in (0, *(order if order is not None else range(1, len(self.decisions)))):
            allowed = np.flatnonzero(self.allowed(found, i))
            places = np.asarray(self.decisions[i].places)
            away = np.square(places[allowed] - places[policy[i]]).sum(-1)
            found[i] = allowed[away.argmin()]
        return tuple(found.tolist())

    def describe(self, policy: Sequence[int]) -> dict[str, str]:
        """A policy by names: {decision: option}."""
        return {d.name: d.options[o] for d, o in zip(self.decisions, policy, strict=True)}

    def _keeps(self, metric: str, total: np.ndarray | float) -> np.ndarray | bool:
        limit = self.limits[metric]
        return total <= limit + ROUNDING * abs(limit)

    def _nearest(self) -> str:
        wanted = ", ".join(f"{metric} <= {limit:g}" for metric, limit in self.limits.items())
        total = self.total(self.reserve)
        nearest = ", ".join(
            f"{metric} <= {max(_rounded_up(total[metric]), limit):g}"
            for metric, limit in self.limits.items()
        )
        policy = ", ".join(f"{k}={v}" for k, v in self.describe(self.reserve).items())
        return (
            f"no policy keeps the budgets {wanted}; the nearest that one keeps: {nearest} "
            f"({policy})"
        )


def _rounded_up(value: float) -> float:
    """To the six digits that a message shows: what it names has to be enough."""
    context = decimal.Context(prec=6, rounding=decimal.ROUND_CEILING)
    return float(context.create_decimal_from_float(value))
