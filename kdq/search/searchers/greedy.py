"""One option at a time, by what it adds to the objective for what it saves."""

from collections.abc import Iterator, Sequence

import numpy as np

from kdq.search.problem import Policy, Problem


class Greedy:
    """For each student down from the best options, and up from the cheapest."""

    needs = ("sensitivity",)

    def __init__(self, problem: Problem, *, seed: int, evaluations: int):
        found: dict[Policy, None] = {}
        for reserve in problem.reserves[0]:
            reserve = tuple(reserve.tolist())
            for start in (_down(problem, reserve[0]), reserve):
                if start is not None and problem.feasible(start):
                    found[_up(problem, start)] = None
        self._left = list(found)[:evaluations]

    def propose(self) -> list[Policy]:
        left, self._left = self._left, []
        return left

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        """There is nothing to learn."""


def _down(problem: Problem, student: int) -> Policy | None:
    """From the least sensitive options to the budgets, by the least harm for what is saved."""
    cost = np.where(problem.valid[student], problem.sensitivity[student], np.inf)
    policy: Policy | None = (student, *cost.argmin(-1)[1:].tolist())
    while policy is not None and not problem.feasible(policy):
        over = _over(problem, policy)
        shares = {m: 1 / abs(problem.limits[m] or 1.0) for m in over}
        moves = [
            (harm / saved, other)
            for other, harm, saved in _moves(problem, policy, shares)
            # What saves of one budget may spend of another: on the whole nearer, or it has no end.
            if saved > 0 and sum(_over(problem, other).values()) < sum(over.values())
        ]
        policy = min(moves)[1] if moves else None
    return policy


def _over(problem: Problem, policy: Policy) -> dict[str, float]:
    """By how much of itself each budget that a policy exceeds is exceeded."""
    total = problem.total(policy)
    return {
        m: (total[m] - limit) / abs(limit or 1.0)
        for m, limit in problem.limits.items()
        if total[m] > limit
    }


def _up(problem: Problem, policy: Policy) -> Policy:
    """From a policy within the budgets to their edge, by the most gain for what it costs."""
    shares = {m: 1 / abs(limit or 1.0) for m, limit in problem.limits.items()}
    while True:
        moves = [
            (harm / max(-saved, 1e-12), other)
            for other, harm, saved in _moves(problem, policy, shares)
            if harm < 0 and problem.feasible(other)
        ]
        if not moves:
            return policy
        policy = min(moves)[1]


def _moves(
    problem: Problem, policy: Policy, shares: dict[str, float]
) -> Iterator[tuple[Policy, float, float]]:
    """Policies that differ in one decision: what each adds to the objective, and what it saves."""
    student = policy[0]
    saves = sum(share * problem.costs[metric][student] for metric, share in shares.items())
    for i in problem.free:
        if i == 0:
            continue
        for option in np.flatnonzero(problem.valid[student, i]).tolist():
            if option != policy[i]:
                harm = problem.sensitivity[student, i]
                saved = float(np.subtract(saves[i, policy[i]], saves[i, option])) if shares else 0.0
                other = (*policy[:i], option, *policy[i + 1 :])
                yield other, float(harm[option] - harm[policy[i]]), saved
