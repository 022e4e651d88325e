"""Searchers: each proposes policies and is told how good they are. One file each."""

from kdq.search.searchers.ddpg import DDPG
from kdq.search.searchers.greedy import Greedy
from kdq.search.searchers.knapsack import Knapsack, PairwiseKnapsack
from kdq.search.searchers.nsga2 import NSGA2
from kdq.search.searchers.ppo import PPO
from kdq.search.searchers.random import Random
from kdq.search.searchers.tpe import TPE
from kdq.search.searchers.uniform import Uniform

METHODS = {
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
