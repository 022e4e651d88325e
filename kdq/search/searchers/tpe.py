"""Bayesian optimization by tree-structured Parzen estimators (Bergstra et al. 2011), by Optuna."""

from types import ModuleType
from typing import Any

from kdq.search.problem import Problem
from kdq.search.searchers._optuna import Asked


class TPE(Asked):
    """Decisions are modelled together.

    Args:
      startup: policies by chance at first.
    """

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, startup: int = 20):
        super().__init__(problem, seed=seed, evaluations=evaluations, startup=startup)

    def sampler(self, optuna: ModuleType, *, seed: int, startup: int) -> Any:
        return optuna.samplers.TPESampler(n_startup_trials=startup, multivariate=True, seed=seed)
