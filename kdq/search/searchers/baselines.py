"""Random and uniform policies: every other searcher has to beat them at equal evaluations."""

from typing import Any

import numpy as np

from kdq.search.problem import Policy, Problem
from kdq.search.searcher import Searcher


class Random(Searcher):
    """Decisions in a random order, each any of the options that the budgets leave."""

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Any):
        self._problem, self._left = problem, evaluations
        self._rng = np.random.default_rng(seed)

    def propose(self) -> list[Policy]:
        count = min(self._left, 16)
        self._left -= count
        return [draw(self._problem, self._rng) for _ in range(count)]


def draw(problem: Problem, rng: np.random.Generator) -> Policy:
    """Returns a random policy that keeps the budgets."""
    policy = np.full(len(problem.decisions), -1)
    for i in (0, *(1 + rng.permutation(len(policy) - 1))):
        policy[i] = rng.choice(np.flatnonzero(problem.allowed(policy, i)))
    return tuple(policy.tolist())


class Uniform(Searcher):
    """Every uniform policy that keeps the budgets, and each with the most bits at both ends."""

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Any):
        bits = [i for i, decision in enumerate(problem.decisions) if decision.kind == "bits"]
        options = [decision.options for decision in problem.decisions]
        labels = dict.fromkeys(label for i in bits for label in options[i])
        policies: dict[Policy, None] = {}
        for student in range(problem.students):
            for label in labels:
                # Without an option of that label the last: the most bits, or distilled.
                places = [o.index(label) if label in o else len(o) - 1 for o in options[1:]]
                flat = (student, *places)
                ends = list(flat)
                for i in (*bits[:1], *bits[-1:]):
                    ends[i] = len(options[i]) - 1
                policies |= dict.fromkeys((flat, tuple(ends)))
        self._left = [policy for policy in policies if problem.feasible(policy)][:evaluations]

    def propose(self) -> list[Policy]:
        left, self._left = self._left, []
        return left
