"""Evolution: NSGA-II (Deb et al. 2002), by Optuna."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from kdq.search.problem import Policy, Problem
from kdq.search.searchers._optuna import Asked


class NSGA2(Asked):
    """Two objectives: the score, and the largest share of a budget that is used.

    Args:
      population: policies of a generation.
    """

    objectives = 2

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, population: int = 20):
        self.at_once = population
        super().__init__(problem, seed=seed, evaluations=evaluations, population=population)

    def sampler(self, optuna: ModuleType, *, seed: int, population: int) -> Any:
        return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)

    def values(self, policy: Policy, score: float) -> Sequence[float]:
        total = self._problem.total(policy)
        used = [total[m] / limit for m, limit in self._problem.limits.items() if limit > 0]
        return [score, max(used, default=0.0)]
