"""The exact optimum of what sensitivities predict, as an integer program (arXiv:2011.10680)."""

import dataclasses
from typing import ClassVar

from kdq.search import programs
from kdq.search.problem import Policy, Problem
from kdq.search.searcher import Searcher

AT_ONCE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    # Policies in all. Each is ruled out for those after it, which makes later programs harder.
    pool: int = 20


class Knapsack(Searcher):
    """The policy with the least predicted objective, then the next best, and so on.

    Sensitivities alone leave out what layers do to each other; so the first few of those that are
    predicted to be good are evaluated.
    """

    Settings = _Settings
    needs: ClassVar[tuple[str, ...]] = ("sensitivity",)

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: _Settings):
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
