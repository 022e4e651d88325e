"""The baseline: the same bits everywhere, or everywhere but in the first and the last layer."""

from typing import Any

from kdq.search.problem import Policy, Problem
from kdq.search.searcher import Searcher


class Uniform(Searcher):
    """Every uniform policy that keeps the budgets, and each with the most bits at both ends."""

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Any):
        bits = [i for i, decision in enumerate(problem.decisions) if decision.kind == "bits"]
        labels = dict.fromkeys(label for i in bits for label in problem.decisions[i].options)
        policies: dict[Policy, None] = {}
        for student in range(problem.students):
            for label in labels:
                flat = (student, *(_option(d.options, label) for d in problem.decisions[1:]))
                ends = list(flat)
                for i in (*bits[:1], *bits[-1:]):
                    ends[i] = len(problem.decisions[i].options) - 1
                policies |= dict.fromkeys((flat, tuple(ends)))
        self._left = [policy for policy in policies if problem.feasible(policy)][:evaluations]

    def propose(self) -> list[Policy]:
        left, self._left = self._left, []
        return left


def _option(options: tuple[str, ...], label: str) -> int:
    """Returns the option of that label, else the last: the most bits, or distilled."""
    return options.index(label) if label in options else len(options) - 1
