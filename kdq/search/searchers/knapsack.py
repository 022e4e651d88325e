"""The exact optimum of what sensitivities predict, as an integer program (arXiv:2011.10680)."""

from collections.abc import Sequence

from kdq.search import programs
from kdq.search.problem import Policy, Problem

AT_ONCE = 8


class Knapsack:
    """The policy with the least predicted objective, then the next best, and so on.

    Sensitivities alone leave out what layers do to each other; so the first few of those that are
    predicted to be good are evaluated.

    Args:
      pool: how many. Each is ruled out for those after it, which makes later programs harder.
    """

    needs: tuple[str, ...] = ("sensitivity",)

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, pool: int = 20):
        self._problem = problem
        self._most = min(pool, evaluations)
        self._found: list[Policy] = []

    def propose(self) -> list[Policy]:
        known = len(self._found)
        while len(self._found) < min(self._most, known + AT_ONCE):
            policy = programs.best(self._problem, exclude=self._found)
            if policy is None:
                self._most = len(self._found)
                break
            self._found.append(policy)
        return self._found[known:]

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        """Sensitivities are all it goes by."""


class PairwiseKnapsack(Knapsack):
    """The same with what pairs of layers add beyond the sum of each (arXiv:2307.05657).

    Its programs are larger: of ten layers with five choices each takes seconds.
    """

    needs = ("sensitivity", "pairs")
