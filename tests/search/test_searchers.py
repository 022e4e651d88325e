"""The contract of every searcher; how good each is at its own kind of problem."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import (
    every_policy,
    feasible_policies,
    interacting,
    keeps,
    layered,
    limited,
    predicted,
    random_policies,
    search,
)

from kdq.config import ConfigError
from kdq.search import programs
from kdq.search.searchers import METHODS, make

EVALUATIONS = 24
BITS = (2, 3, 4, 6, 8)
RANDOM = ("random", "nsga2", "tpe", "ddpg", "ppo")  # whose seed matters
AGENTS = ("ddpg", "ppo")
# Learning as little as an agent can, so that what is tested is not how well it learns.
QUICK = {
    "ddpg": {"hidden": (8,), "updates": 2, "batch_size": 8, "replay": 16},
    "ppo": {"hidden": (8,), "epochs": 2},
}


def searched(problem, name, *, evaluations=EVALUATIONS, seed=0, unit=1.0, **options):
    """Returns all policies that a searcher proposes, scored by what the sensitivities predict."""
    options = QUICK.get(name, {}) | options
    searcher = make(name, problem, seed=seed, evaluations=evaluations, **options)
    policies = []
    while (proposed := searcher.propose()) and len(policies) < evaluations:
        searcher.observe(proposed, [unit * predicted(problem, policy) for policy in proposed])
        policies += proposed
    return policies


PROBLEMS = st.builds(
    limited,
    layers=st.integers(1, 5),
    bits=st.sampled_from([(2, 8), (8, 2, 4)]),
    students=st.integers(1, 2),
    metrics=st.integers(1, 3),
    slack=st.sampled_from([0.0, 0.02, 0.3]),
    seed=st.integers(0, 10**6),
)


def of_shape(students, metrics):
    """Problems of one shape: agents compile for each."""
    return st.builds(
        layered,
        layers=st.just(3),
        bits=st.just(BITS),
        students=st.just(students),
        metrics=st.just(metrics),
        budget=st.floats(0.3, 1.0),
        seed=st.integers(0, 10**6),
    )


@pytest.mark.parametrize(
    ("name", "problems"),
    [
        *((name, PROBLEMS) for name in METHODS if name not in AGENTS),
        *((name, of_shape(2, 3)) for name in AGENTS),
        *(
            pytest.param(name, of_shape(1, metrics), marks=pytest.mark.slow)
            for name in AGENTS
            for metrics in (1, 2)
        ),
    ],
    ids=str,
)
def test_budgets_are_never_exceeded(name, problems):
    count = 24 if name in AGENTS else 10

    @settings(
        max_examples=6 if name in AGENTS else 12,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(problem=problems, seed=st.integers(0, 100))
    def check(problem, seed):
        policies = searched(problem, name, seed=seed, evaluations=count)
        assert len(policies) <= count
        assert all(keeps(problem, policy, problem.limits) for policy in policies)
        # The baseline may have nothing to propose; others always do.
        assert policies or name == "uniform"

    check()


@pytest.mark.parametrize("name", METHODS)
def test_options_that_a_layer_may_not_take_are_not_proposed(name):
    """As the worst layer's budget rules out: by layer and by student."""
    problem = layered(layers=4, bits=(2, 4, 8), students=2, budget=0.8)
    problem.valid[0, 2, 1:] = False
    problem.valid[1, 3, 0] = False
    policies = searched(problem, name)
    assert all(problem.valid[p[0], i, o] for p in policies for i, o in enumerate(p))
    assert policies


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_decides_everything(name):
    problem = layered(layers=5, bits=(2, 4, 8), students=2, metrics=2, budget=0.6)
    first = searched(problem, name, seed=3)
    assert searched(problem, name, seed=3) == first
    if name in RANDOM:
        assert searched(problem, name, seed=4) != first
    if name in AGENTS:  # and the unit of scores nothing
        assert searched(problem, name, seed=3, unit=1000.0) == first


@pytest.mark.parametrize("name", METHODS)
def test_it_stops_at_its_evaluations(name):
    problem = layered(layers=5, bits=(2, 4, 8), students=2, metrics=2, budget=0.6)
    searcher = make(name, problem, seed=0, evaluations=7, **QUICK.get(name, {}))
    count = 0
    while policies := searcher.propose():
        searcher.observe(policies, [predicted(problem, p) for p in policies])
        count += len(policies)
    # Greedy and uniform have so few; the knapsack's next best are as many as there are.
    assert 0 < count <= 7
    assert count == 7 or name in ("uniform", "greedy")
    searcher.observe([], [])
    assert searcher.propose() == []


@pytest.mark.parametrize(
    ("name", "count", "seeds"),
    [
        ("greedy", 24, 1),
        ("knapsack", 24, 1),
        ("nsga2", 200, 5),
        pytest.param("tpe", 120, 5, marks=pytest.mark.slow),
    ],
)
def test_learning_beats_chance(name, count, seeds):
    """At equal evaluations, in the median over seeds."""
    problem = layered(layers=8, bits=BITS, budget=0.4)
    best = lambda policies: min(predicted(problem, p) for p in policies)
    learned = [best(searched(problem, name, evaluations=count, seed=s)) for s in range(seeds)]
    chance = [best(random_policies(problem, count, s)) for s in range(9)]
    assert np.median(learned) < np.median(chance)


def agent(name, problem, seed=0, evaluations=400):
    return make(name, problem, seed=seed, evaluations=evaluations)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "sizes"), [("ddpg", {"layers": 8, "bits": BITS}), ("ppo", {"layers": 10})]
)
def test_agents_come_within_two_percent_of_the_optimum(name, sizes, seed):
    problem = layered(**sizes, seed=seed)
    optimum = problem.predicted(programs.best(problem))
    scores = search(agent(name, problem, seed), problem.predicted).values()
    assert min(scores) <= 1.02 * optimum
    # As many random ones do not.
    assert min(map(problem.predicted, random_policies(problem, 400, seed))) > 1.02 * optimum


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_agents_learn_what_layers_do_to_each_other(name):
    """The sensitivities that they observe know nothing of it."""
    problem, score = interacting(BITS)
    optimum = min(score(p) for p in every_policy(problem) if problem.feasible(p))
    assert min(search(agent(name, problem), score).values()) <= 1.02 * optimum
    assert score(programs.best(problem)) > 1.1 * optimum


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"), [("ddpg", {"layers": 8, "bits": BITS}), ("ppo", {"layers": 10})]
)
def test_agents_beat_chance_without_sensitivities(name, sizes):
    problem = layered(**sizes)
    blind = dataclasses.replace(problem, sensitivity=None)
    scores = search(agent(name, blind), problem.predicted).values()
    optimum = problem.predicted(programs.best(problem))
    chance = min(map(problem.predicted, random_policies(problem, 400, 0)))
    assert min(scores) - optimum < 0.5 * (chance - optimum)


@pytest.mark.parametrize(
    ("name", "evaluations", "options", "at_once", "distinct"),
    [("ddpg", 20, {"noise": 1.0}, 1, 8), ("ppo", 21, {"episodes": 5}, 5, 9)],
)
def test_agents_propose_new_policies_while_there_are(name, evaluations, options, at_once, distinct):
    """And bear scores that are no numbers."""
    problem = layered(layers=2, bits=(2, 4, 8), budget=1.0)
    options = QUICK[name] | options
    searcher = make(name, problem, seed=0, evaluations=evaluations, **options)
    policies = []
    while proposed := searcher.propose():
        assert 1 <= len(proposed) <= at_once
        policies += proposed
        searcher.observe(proposed, [np.nan] * len(proposed))
    assert len(policies) == evaluations
    assert distinct <= len(set(policies)) <= 9
    searcher.observe([], [])
    assert searcher.propose() == []


def test_fewer_scores_than_policies_are_enough():
    """A search that is over may score the first ones only, or none."""
    problem = layered(layers=4, bits=BITS)
    searcher = make("ppo", problem, seed=0, evaluations=30, **QUICK["ppo"])
    for count in (3, 0, 1):
        policies = searcher.propose()
        assert len(policies) == 8
        searcher.observe(policies[:count], [1.0, 2.0, 3.0][:count])
    policies = searcher.propose()
    assert all(problem.feasible(policy) for policy in policies)
    # Networks that are not finite would draw one policy, over and over.
    assert len(set(policies)) == len(policies) == 6


def test_random_reaches_every_policy_there_is():
    problem = layered(layers=3, bits=(2, 4), students=2, budget=0.9)
    within = feasible_policies(problem)
    assert 4 < len(within) < 32
    assert set(searched(problem, "random", evaluations=400)) == within


def with_student(problem):
    """The first decision is that for the student: a choice of no bits."""
    student = dataclasses.replace(problem.decisions[0], kind="student")
    return dataclasses.replace(problem, decisions=(student, *problem.decisions[1:]))


def test_uniform_is_every_equal_number_of_bits_and_the_most_at_both_ends():
    problem = with_student(layered(layers=4, bits=(2, 3, 8), budget=1.0))
    expected = {(0, b, b, b, b) for b in range(3)} | {(0, 2, b, b, 2) for b in range(3)}
    assert set(searched(problem, "uniform")) == expected
    tight = with_student(layered(layers=4, bits=(2, 3, 8), budget=0.3))
    fits = {p for p in expected if keeps(tight, p, tight.limits)}
    assert set(searched(tight, "uniform")) == fits


def test_greedy_by_hand():
    """Two layers of sizes 10 and 20 at 2 or 8 bits, 140 bits in all: one of them can have 8."""
    problem = layered(layers=2, bits=(2, 8), budget=1.0)
    problem.costs["weights"][0, 1:, :2] = [[20, 80], [40, 160]]
    problem.sensitivity[0, 1:, :2] = [[0.9, 0.0], [1.0, 0.0]]
    problem.constants["weights"][:] = 0
    tight = dataclasses.replace(problem, limits={"weights": 140.0})
    # From (8, 8), 240 bits: the first saves 60 for 0.9, 0.015 a bit, the second 120 for 1.0: it
    # goes, and 120 bits are kept. From (2, 2) up: 0.9 for 60 bits beats 1.0 for 120.
    assert searched(tight, "greedy") == [(0, 1, 0)]


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_near_the_best_and_nothing_fits_beside_it(seed):
    problem = layered(layers=5, bits=(2, 4, 8), students=2, budget=0.5, seed=seed)
    values = sorted(predicted(problem, p) for p in feasible_policies(problem))
    policies = searched(problem, "greedy")
    best = min(predicted(problem, p) for p in policies)
    assert best <= values[len(values) // 50]  # of the best 2%
    for policy in policies:  # one option more does not fit, or does no good
        for i, option in itertools.product(range(1, 6), range(3)):
            other = (*policy[:i], option, *policy[i + 1 :])
            if keeps(problem, other, problem.limits):
                assert predicted(problem, other) >= predicted(problem, policy)


def test_mistakes_in_names_and_options_are_named():
    problem = layered(layers=1)
    with pytest.raises(ValueError, match=r"searcher 'greedily' \(did you mean 'greedy'\?\); valid"):
        make("greedily", problem, seed=0, evaluations=1)
    with pytest.raises(ConfigError, match=r"'pol' .did you mean 'pool'"):
        make("knapsack", problem, seed=0, evaluations=1, pol=3)
    with pytest.raises(ConfigError, match=r"options of tpe.startup='many'"):
        make("tpe", problem, seed=0, evaluations=1, startup="many")
    for method in METHODS.values():  # hashable: agents' are static arguments of jit
        assert hash(method.Settings()) == hash(method.Settings())
