"""Searchers by name: each proposes policies and is given their scores."""

from typing import Any

from kdq.fields import ConfigError, build, unknown
from kdq.search.problem import Problem
from kdq.search.searcher import Searcher
from kdq.search.searchers.baselines import Random, Uniform
from kdq.search.searchers.ddpg import DDPG
from kdq.search.searchers.ppo import PPO
from kdq.search.searchers.samplers import NSGA2, TPE
from kdq.search.searchers.sensitivities import Greedy, Knapsack, PairwiseKnapsack

METHODS: dict[str, type[Searcher]] = {
    "uniform": Uniform,
    "random": Random,
    "greedy": Greedy,
    "knapsack": Knapsack,
    "knapsack_pairwise": PairwiseKnapsack,
    "nsga2": NSGA2,
    "tpe": TPE,
    "ddpg": DDPG,
    "ppo": PPO,
}


def make(name: str, problem: Problem, *, seed: int, evaluations: int, **options: Any) -> Searcher:
    """Returns a new searcher: `name` is a key of `METHODS`, `options` are fields of its `Settings`.

    Raises:
      ConfigError: an unknown name or option, or a value of another type.
    """
    if name not in METHODS:
        raise ConfigError(unknown("searcher", name, METHODS))
    settings = build(METHODS[name].Settings, options, f"options of {name}")
    return METHODS[name](problem, seed=seed, evaluations=evaluations, settings=settings)
