"""Random policies: the baseline that every other searcher has to beat at equal evaluations."""

from typing import Any

import numpy as np

from kdq.search.feasible import Feasible
from kdq.search.problem import Policy, Problem
from kdq.search.searcher import Searcher


class Random(Searcher):
    """Decisions in a random order, each any of the options that the budgets leave."""

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Any):
        self._feasible, self._left = Feasible(problem), evaluations
        self._rng = np.random.default_rng(seed)

    def propose(self) -> list[Policy]:
        count = min(self._left, 16)
        self._left -= count
        return [draw(self._feasible, self._rng) for _ in range(count)]


def draw(feasible: Feasible, rng: np.random.Generator) -> Policy:
    """Returns a random policy that keeps the budgets."""
    policy = np.full(len(feasible.problem.decisions), -1)
    for i in (0, *(1 + rng.permutation(len(policy) - 1))):
        policy[i] = rng.choice(np.flatnonzero(feasible.allowed(policy, i)))
    return tuple(policy.tolist())
