"""The policies of a problem that keep its budgets: which options are left, which is nearest."""

import decimal
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from kdq.search import programs
from kdq.search.problem import InfeasibleError, Policy, Problem


class Feasible:
    """Completes and mends policies of a problem within its limits.

    Its integer programs are solved when first needed, and once.
    """

    def __init__(self, problem: Problem):
        self.problem = problem

    @functools.cached_property
    def reserve(self) -> Policy:
        """The policy that comes nearest to the limits, or keeps them with the most to spare."""
        return programs.nearest(self.problem)

    @functools.cached_property
    def reserves(self) -> np.ndarray:
        """Ways to end well, [reserves, students, decisions] int: cheap ones by mixtures of metrics.

        While a policy is built, an option may be taken if one of these completes it within the
        limits. With one budget that loses nothing; with several a few policies at the very edge.
        """
        problem = self.problem
        ways = [np.array([programs.nearest(problem, s) for s in range(problem.students)])]
        steps = (0.0, 0.25, 0.5, 0.75, 1.0)
        mixtures = itertools.product(steps, repeat=len(problem.limits))
        for mixture in [m for m in mixtures if sum(m) == 1.0] or [()]:
            cost = np.zeros(problem.valid.shape)
            for weight, (metric, limit) in zip(mixture, problem.limits.items(), strict=True):
                cost += weight * problem.costs[metric] / max(abs(limit), 1e-300)
            ways.append(np.where(problem.valid, cost, np.inf).argmin(-1))
        return np.stack(ways)

    def check(self) -> None:
        """Raises InfeasibleError, with the nearest limits, if no policy keeps them."""
        problem, reserve = self.problem, self.reserve
        if problem.feasible(reserve):
            return
        budgets = ", ".join(f"{metric} <= {limit:g}" for metric, limit in problem.limits.items())
        total = problem.total(reserve)
        nearest = ", ".join(
            f"{metric} <= {max(_round_up(total[metric]), limit):g}"
            for metric, limit in problem.limits.items()
        )
        policy = ", ".join(f"{k}={v}" for k, v in problem.describe(reserve).items())
        raise InfeasibleError(
            f"no policy keeps the budgets {budgets}; the nearest that one keeps: {nearest} "
            f"({policy})"
        )

    def allowed(self, partial: Sequence[int], decision: int) -> np.ndarray:
        """Returns which options of a decision may be taken, [options] bool.

        At least one is, if each option before was allowed.

        Args:
          partial: the option of each decision, -1 where there is none yet. The student is the first
            to be decided.
          decision: an open one.
        """
        problem, count = self.problem, len(self.problem.decisions[decision].options)
        tried = np.repeat(np.asarray(partial)[None], count, axis=0)
        tried[:, decision] = np.arange(count)
        student = tried[:, 0]
        # [reserves, options, decisions]: each option, completed in each way.
        whole = np.where(tried[None] < 0, self.reserves[:, student], tried[None])
        at = (student[None, :, None], np.arange(len(problem.decisions)), whole)
        keeps = problem.valid[at].all(-1)
        for metric in problem.limits:
            total = problem.constants[metric][student] + problem.costs[metric][at].sum(-1)
            keeps &= problem.keeps(metric, total)
        return keeps.any(0)

    def projected(self, policy: Sequence[int], order: Sequence[int] | None = None) -> Policy:
        """Returns a policy that keeps the limits: itself, or option by option the nearest to it.

        Args:
          policy: an option of each decision, in any cost.
          order: of the decisions after the student; those that come late get what is left.
        """
        problem = self.problem
        if problem.feasible(policy):
            return tuple(int(option) for option in policy)
        partial = np.full(len(problem.decisions), -1)
        for i in (0, *(order if order is not None else range(1, len(partial)))):
            allowed = np.flatnonzero(self.allowed(partial, i))
            places = np.asarray(problem.decisions[i].places)
            away = np.square(places[allowed] - places[policy[i]]).sum(-1)
            partial[i] = allowed[away.argmin()]
        return tuple(partial.tolist())


def _round_up(value: float) -> float:
    """Rounds up to the six digits that a message shows, so that the budget it names is enough."""
    context = decimal.Context(prec=6, rounding=decimal.ROUND_CEILING)
    return float(context.create_decimal_from_float(value))
