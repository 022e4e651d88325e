"""Searchers by Optuna's samplers: evolution and Bayesian optimization; need `kdq[search]`."""

import dataclasses
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from kdq.deploy import extras
from kdq.search.problem import Policy, Problem
from kdq.search.searcher import Searcher


class _Sampled(Searcher):
    """Trials of a sampler, each made to keep the budgets before it is evaluated."""

    libraries: ClassVar[tuple[str, ...]] = ("optuna",)
    objectives: ClassVar[int] = 1
    _at_once = 1  # policies that are proposed together

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, settings: Any):
        (optuna,) = extras.load("search", "optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._problem, self._settings, self._left = problem, settings, evaluations
        self._rng = np.random.default_rng(seed)
        with warnings.catch_warnings():  # samplers that call some of their options experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = self._sampler(optuna.samplers, seed)
        self._study = optuna.create_study(
            directions=["minimize"] * self.objectives, sampler=sampler
        )
        self._space = {
            decision.name: optuna.distributions.IntDistribution(0, len(decision.options) - 1)
            for decision in (problem.decisions[i] for i in problem.free)
        }
        self._trials: list[Any] = []

    def propose(self) -> list[Policy]:
        count = min(self._left, self._at_once)
        self._left -= count
        self._trials = [self._study.ask(self._space) for _ in range(count)]
        policies = []
        for trial in self._trials:  # of each the policy nearest to it; no layer goes first
            policy = [trial.params.get(decision.name, 0) for decision in self._problem.decisions]
            order = 1 + self._rng.permutation(len(policy) - 1)
            policies.append(self._problem.projected(policy, order))
        return policies

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        for trial, policy, score in zip(self._trials, policies, scores, strict=False):
            self._study.tell(trial, self._values(policy, score))

    def _sampler(self, samplers: ModuleType, seed: int) -> Any:
        """Returns a new sampler of Optuna's."""
        raise NotImplementedError

    def _values(self, policy: Policy, score: float) -> list[float]:
        """Returns the objectives of a trial."""
        return [score]


class NSGA2(_Sampled):
    """NSGA-II (Deb et al. 2002), by the score and the largest share of a budget that is used."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings:
        population: int = 20  # policies of a generation

    objectives = 2

    def _sampler(self, samplers: ModuleType, seed: int) -> Any:
        self._at_once = self._settings.population
        return samplers.NSGAIISampler(population_size=self._at_once, seed=seed)

    def _values(self, policy: Policy, score: float) -> list[float]:
        total = self._problem.total(policy)
        used = [total[m] / limit for m, limit in self._problem.limits.items() if limit > 0]
        return [score, max(used, default=0.0)]


class TPE(_Sampled):
    """Tree-structured Parzen estimators (Bergstra et al. 2011), of all decisions together."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings:
        startup: int = 20  # random policies at first

    def _sampler(self, samplers: ModuleType, seed: int) -> Any:
        startup = self._settings.startup
        return samplers.TPESampler(n_startup_trials=startup, multivariate=True, seed=seed)
