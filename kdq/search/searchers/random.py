"""Policies by chance: what every other searcher has to beat at equal evaluations."""

from collections.abc import Sequence

import numpy as np

from kdq.search.problem import Policy, Problem


class Random:
    """Decisions in an order by chance, each any of the options that the budgets leave."""

    needs = ()

    def __init__(self, problem: Problem, *, seed: int, evaluations: int):
        self._problem, self._left = problem, evaluations
        self._rng = np.random.default_rng(seed)

    def propose(self) -> list[Policy]:
        count = min(self._left, 16)
        self._left -= count
        return [draw(self._problem, self._rng) for _ in range(count)]

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        """There is nothing to learn."""


def draw(problem: Problem, rng: np.random.Generator) -> Policy:
    """A policy by chance that keeps the budgets."""
    found = np.full(len(problem.decisions), -1)
    for i in (0, *(1 + rng.permutation(len(found) - 1))):
        found[i] = rng.choice(np.flatnonzero(problem.allowed(found, i)))
    return tuple(found.tolist())
