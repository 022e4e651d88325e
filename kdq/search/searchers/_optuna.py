"""What searchers of Optuna share: a study that is asked and told."""

import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from kdq.deploy import extras
from kdq.search.problem import Policy, Problem


class Asked:
    """A sampler's trials, each made to keep the budgets before it is evaluated."""

    needs = ()
    libraries = ("optuna",)
    at_once = 1
    objectives = 1

    def __init__(self, problem: Problem, *, seed: int, evaluations: int, **options: Any):
        (self._optuna,) = extras.load("search", "optuna")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._problem, self._left = problem, evaluations
        self._rng = np.random.default_rng(seed)
        with warnings.catch_warnings():  # samplers that call some of their options experimental
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            sampler = self.sampler(self._optuna, seed=seed, **options)
        self._study = self._optuna.create_study(
            directions=["minimize"] * self.objectives, sampler=sampler
        )
        self._space = {
            one.name: self._optuna.distributions.IntDistribution(0, len(one.options) - 1)
            for one in (problem.decisions[i] for i in problem.free)
        }
        self._asked: list[Any] = []

    def sampler(self, optuna: ModuleType, *, seed: int, **options: Any) -> Any:
        """Of Optuna, with a searcher's options."""
        raise NotImplementedError

    def propose(self) -> list[Policy]:
        count = min(self._left, self.at_once)
        self._left -= count
        self._asked = [self._study.ask(self._space) for _ in range(count)]
        return [self._policy(trial) for trial in self._asked]

    def _policy(self, trial: Any) -> Policy:
        """What a trial asks for, or the next to it that keeps the budgets; no layer goes first."""
        wanted = [trial.params.get(one.name, 0) for one in self._problem.decisions]
        order = 1 + self._rng.permutation(len(wanted) - 1)
        return self._problem.projected(wanted, order)

    def values(self, policy: Policy, score: float) -> Sequence[float]:
        """The objectives of a trial."""
        return [score]

    def observe(self, policies: Sequence[Policy], scores: Sequence[float]) -> None:
        for trial, policy, score in zip(self._asked, policies, scores, strict=False):
            self._study.tell(trial, self.values(policy, score))
