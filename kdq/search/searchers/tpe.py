"""Bayesian optimization by tree-structured Parzen estimators (Bergstra et al. 2011), by Optuna."""

from typing import Any

from kdq.search.searchers._optuna import Asked


class TPE(Asked):
    """Decisions are modelled together.

    Args:
      startup: policies by chance at first.
    """

    def __init__(self, *args: Any, startup: int = 20, **kwargs: Any):
        super().__init__(*args, startup=startup, **kwargs)

    def sampler(self, optuna: Any, *, seed: int, startup: int) -> Any:
        return optuna.samplers.TPESampler(n_startup_trials=startup, multivariate=True, seed=seed)
