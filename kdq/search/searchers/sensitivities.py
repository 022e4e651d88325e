"""Searchers by sensitivities: greedy, one option at a time; and the optimum of a program."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from kdq.search import programs
from kdq.search.problem import Policy, Problem
from kdq.search.searcher import Searcher

AT_ONCE = 8  # policies that a knapsack proposes together


class Greedy(Searcher):
    """For each student down from the best options, and up from the cheapest.

    One option at a time, by what it adds to the objective for what it saves.
    """

    needs: ClassVar[tuple[str, ...]] = ("sensitivity",)

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Any):
        policies: dict[Policy, None] = {}
        for reserve in problem.reserves[0].tolist():
            for start in (_lower(problem, reserve[0]), tuple(reserve)):
                if start is not None and problem.feasible(start):
                    policies[_raise(problem, start)] = None
        self._left = list(policies)[:evaluations]

    def propose(self) -> list[Policy]:
        left, self._left = self._left, []
        return left


def _lower(problem: Problem, student: int) -> Policy | None:
    """Goes from the least sensitive options to the budgets, by the least harm for what is saved."""
    cost = np.where(problem.valid[student], problem.sensitivity[student], np.inf)
    policy: Policy | None = (student, *cost.argmin(-1)[1:].tolist())
    while policy is not None and not problem.feasible(policy):
        excess = _excess(problem, policy)
        moves = [
            (harm / saved, other)
            for other, harm, saved in _moves(problem, policy, excess)
            # A saving in one budget may spend of another: nearer on the whole, or it has no end.
            if saved > 0 and sum(_excess(problem, other).values()) < sum(excess.values())
        ]
        policy = min(moves)[1] if moves else None
    return policy


def _excess(problem: Problem, policy: Policy) -> dict[str, float]:
    """Returns by which share of itself each budget that a policy exceeds is exceeded."""
    total = problem.total(policy)
    return {
        m: (total[m] - limit) / abs(limit or 1.0)
        for m, limit in problem.limits.items()
        if total[m] > limit
    }


def _raise(problem: Problem, policy: Policy) -> Policy:
    """Goes from a policy within the budgets to their edge, by the most gain for what it costs."""
    while True:
        moves = [
            (harm / max(-saved, 1e-12), other)
            for other, harm, saved in _moves(problem, policy, problem.limits)
            if harm < 0 and problem.feasible(other)
        ]
        if not moves:
            return policy
        policy = min(moves)[1]


def _moves(problem: Problem, policy: Policy, metrics: Any) -> Iterator[tuple[Policy, float, float]]:
    """Yields policies that differ in one layer, the objective each adds, and the cost it saves.

    A cost is a share of its limit, summed over `metrics`.
    """
    student = policy[0]
    shares = {m: 1 / abs(problem.limits[m] or 1.0) for m in metrics}
    saves = sum(share * problem.costs[metric][student] for metric, share in shares.items())
    for i in problem.free:
        if i == 0:
            continue
        harm = problem.sensitivity[student, i]
        for option in np.flatnonzero(problem.valid[student, i]).tolist():
            if option != policy[i]:
                saved = float(np.subtract(saves[i, policy[i]], saves[i, option])) if shares else 0.0
                other = (*policy[:i], option, *policy[i + 1 :])
                yield other, float(harm[option] - harm[policy[i]]), saved


class Knapsack(Searcher):
    """The policy with the least predicted objective, then the next best (arXiv:2011.10680).

    Sensitivities alone leave out what layers do to each other; so the first few of those that are
    predicted to be good are evaluated.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings:
        # Policies in all. Each is ruled out for those after it, which makes later programs harder.
        pool: int = 20

    needs: ClassVar[tuple[str, ...]] = ("sensitivity",)

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Any):
        self._problem = problem
        self._most = min(settings.pool, evaluations)
        self._proposed: list[Policy] = []

    def propose(self) -> list[Policy]:
        known = len(self._proposed)
        while len(self._proposed) < min(self._most, known + AT_ONCE):
            policy = programs.best(self._problem, exclude=self._proposed)
            if policy is None:
                self._most = len(self._proposed)
                break
            self._proposed.append(policy)
        return self._proposed[known:]


class PairwiseKnapsack(Knapsack):
    """The same with what pairs of layers add beyond the sum of each (arXiv:2307.05657).

    Its programs are larger: of ten layers with five choices each takes seconds.
    """

    needs: ClassVar[tuple[str, ...]] = ("sensitivity", "pairs")
