"""Problems whose best policy is known, for the tests of searchers."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from kdq.search import programs
from kdq.search.problem import ROUNDING, Decision, Policy, Problem
from kdq.search.searcher import Searcher


def layered(
    *,
    layers: int = 10,
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    students: int = 1,
    metrics: int = 1,
    budget: float = 0.4,
    base: float = 0.0,
    seed: int = 0,
) -> Problem:
    """Layers of random sizes and sensitivities; each bit more makes an error four times smaller.

    Metrics: bits of weights, integers; then "latency", floats, that don't go with them.

    Args:
      layers: how many decisions there are after the student.
      bits: the options of each layer.
      students: each with layers twice as large, and half as sensitive, as the one before.
      metrics: 1 to 3.
      budget: the limit of each metric, as a share of the way from its least to its most.
      base: the objective without any rounding, as a share of what the first student's layers add to
        it with their middle options.
      seed: of sizes and sensitivities.
    """
    rng = np.random.default_rng(seed)
    shape = (students, layers + 1, max(len(bits), students))
    sizes = np.exp2(rng.uniform(6, 12, layers)).round() * 2.0 ** np.arange(students)[:, None]
    weights = np.exp2(rng.uniform(-3, 3, layers)) * 0.5 ** np.arange(students)[:, None]
    valid = np.zeros(shape, bool)
    valid[:, 0, :students] = True
    valid[:, 1:, : len(bits)] = True
    costs = {"weights": np.zeros(shape)}
    costs["weights"][:, 1:, : len(bits)] = sizes[..., None] * np.asarray(bits)
    for name in ("latency", "energy")[: metrics - 1]:
        costs[name] = np.where(valid, rng.uniform(0.1, 1.0, shape).cumsum(-1), 0.0)
        costs[name][:, 0] = 0.0
    sensitivity = np.zeros(shape)
    sensitivity[:, 1:, : len(bits)] = weights[..., None] * 4.0 ** -np.asarray(bits, float)
    return Problem(
        decisions=(_student(students), *(_layer(i, bits) for i in range(layers))),
        valid=valid,
        costs=costs,
        constants={metric: np.linspace(0.0, 0.1, students) for metric in costs},
        limits={metric: _limit(valid, cost, budget) for metric, cost in costs.items()},
        features=_features(sizes, students, layers),
        sensitivity=sensitivity,
        base=np.full(students, base * sensitivity[0, 1:, len(bits) // 2].sum()),
    )


def _student(students: int) -> Decision:
    spread = np.linspace(0.0, 1.0, students)
    names = tuple(f"student_{i}" for i in range(students))
    return Decision(name="student", options=names, places=tuple((x, x) for x in spread))


def _layer(index: int, bits: Sequence[int]) -> Decision:
    spread = (np.asarray(bits, float) - min(bits)) / (max(bits) - min(bits))
    names = tuple(f"W{b}A8" for b in bits)
    return Decision(name=f"dense_{index}", options=names, places=tuple((x, 1.0) for x in spread))


def _limit(valid: np.ndarray, cost: np.ndarray, budget: float) -> float:
    """Returns that of the first student, so that it keeps every budget of 0 or more by itself."""
    least = np.where(valid, cost, np.inf).min(-1).sum(-1)[0]
    most = np.where(valid, cost, -np.inf).max(-1).sum(-1)[0]
    return float(least + budget * (most - least))


def _features(sizes: np.ndarray, students: int, layers: int) -> np.ndarray:
    """Returns if it is a layer, and its size on a logarithmic scale."""
    features = np.zeros((students, layers + 1, 2), np.float32)
    features[:, 1:, 0] = 1.0
    features[:, 1:, 1] = np.log2(sizes) / 16
    return features


def random_policies(problem: Problem, count: int, seed: int) -> list[Policy]:
    """Uniformly random policies, projected in a random order: what a search has to beat."""
    rng = np.random.default_rng(seed)
    policies = []
    for _ in range(count):
        policy = [rng.integers(len(decision.options)) for decision in problem.decisions]
        order = 1 + rng.permutation(len(problem.decisions) - 1)
        policies.append(problem.projected(policy, order.tolist()))
    return policies


def search(searcher: Searcher, score: Callable[[Policy], float]) -> dict[Policy, float]:
    """Returns all policies that a searcher proposes until it has no more, with their scores."""
    scored = {}
    while policies := searcher.propose():
        scores = [score(policy) for policy in policies]
        scored |= zip(policies, scores, strict=True)
        searcher.observe(policies, scores)
    return scored


def interacting(bits: Sequence[int]) -> tuple[Problem, Callable[[Policy], float]]:
    """Six layers, few enough to try every policy, and a score that their sum does not explain.

    Each pair of neighbours at different bits adds a fifth of what the best policy has by the sum.
    """
    problem = layered(layers=6, bits=bits, seed=4)
    share = problem.predicted(programs.best(problem)) / 5

    def score(policy: Policy) -> float:
        return problem.predicted(policy) + share * np.count_nonzero(np.diff(policy[1:]))

    return problem, score


def limited(slack: float, seed: int, **sizes) -> Problem:
    """Returns a problem with budgets that a random policy just keeps, or a little more."""
    problem = layered(budget=1.0, seed=seed, **sizes)
    rng = np.random.default_rng(seed)
    policy = [
        int(rng.choice(np.flatnonzero(problem.valid[0, i]))) for i in range(len(problem.decisions))
    ]
    policy[0] = int(rng.integers(problem.students))
    limits = {metric: total(problem, policy, metric) * (1 + slack) for metric in problem.costs}
    return dataclasses.replace(problem, limits=limits)


# By loops, against which problems and programs are tested.


def every_policy(problem: Problem) -> Iterator[Policy]:
    return itertools.product(*(range(len(d.options)) for d in problem.decisions))


def total(problem: Problem, policy: Policy, metric: str) -> float:
    cost = problem.costs[metric]
    return problem.constants[metric][policy[0]] + sum(
        cost[policy[0], i, option] for i, option in enumerate(policy)
    )


def keeps(problem: Problem, policy: Policy, limits: Mapping[str, float]) -> bool:
    """But for the rounding of sums of floats."""
    within = all(total(problem, policy, m) <= limit * (1 + ROUNDING) for m, limit in limits.items())
    return within and all(problem.valid[policy[0], i, o] for i, o in enumerate(policy))


def feasible_policies(problem: Problem) -> set[Policy]:
    return {p for p in every_policy(problem) if keeps(problem, p, problem.limits)}


def predicted(problem: Problem, policy: Policy) -> float:
    """Returns the objective in the integer program, summed in float64."""
    value = problem.base[policy[0]]
    for i, option in enumerate(policy):
        value += problem.sensitivity[policy[0], i, option]
    for (s, i, a, j, b), more in problem.pairs.items():
        value += more * (policy[0] == s and policy[i] == a and policy[j] == b)
    return value
