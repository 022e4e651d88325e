"""From networks and tables to problems: budgets of all kinds, several students."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from kdq import models, quantize
from kdq.config import ConfigError
from kdq.search import cost, spaces
from kdq.search.cost import CostTable
from kdq.search.problem import ROUNDING, InfeasibleError
from kdq.search.searchers import make
from kdq.search.spaces import Student

BITS = ("W2A4", "W4A8", "W8A2", "W8A8")
# Agents compile for each problem; their contract is tested in test_searchers.py.
NAMES = ("uniform", "random", "greedy", "knapsack", "knapsack_pairwise", "nsga2", "tpe")


def make_student(name, widths, choices=BITS, seed=0):
    model = models.build("cnn", num_classes=10, widths=widths)
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    layers = quantize.list_layers(model, variables, image)
    own = dict.fromkeys(layers, choices)
    parameters = models.count_parameters(variables)
    rng = np.random.default_rng(seed)
    return Student(
        name=name,
        layers=layers,
        choices=own,
        costs=CostTable(
            model={}, image_shape=(8, 8, 1), metrics=cost.counted(layers, own, parameters)
        ),
        sensitivity=[np.sort(rng.uniform(size=len(choices)))[::-1] for _ in layers],
        base=0.1 * seed,
    )


STUDENTS = [make_student("wide", (8, 12), seed=1), make_student("narrow", (4, 6), seed=2)]
COUNTED = ("average_bits", "bops", "weight_memory", "activation_memory", "energy")


def every_policy():
    return itertools.product(range(2), *[range(len(BITS))] * 3)


def real_costs(policy):
    """By the tables of students, not by the problem."""
    student = STUDENTS[policy[0]]
    chosen = {path: BITS[o] for path, o in zip(student.choices, policy[1:], strict=True)}
    return {metric: student.costs.total(metric, chosen) for metric in COUNTED}


COSTS = {policy: real_costs(policy) for policy in every_policy()}


def within(limits):
    keeps = lambda costs: all(costs[m] <= limit * (1 + ROUNDING) for m, limit in limits.items())
    return {policy for policy, costs in COSTS.items() if keeps(costs)}


def budgets(seed):
    """Of one to three metrics, that a policy by chance just keeps; the worst layer's among them."""
    rng = np.random.default_rng(seed)
    metrics = list(rng.choice(COUNTED, rng.integers(1, 4), replace=False))
    if seed % 2:
        metrics = list(dict.fromkeys(["activation_memory", *metrics]))
    policy = list(COSTS)[rng.integers(len(COSTS))]
    return {str(metric): COSTS[policy][metric] for metric in metrics}


@pytest.mark.parametrize("seed", range(12))
def test_feasible_is_what_the_tables_say(seed):
    limits = budgets(seed)
    problem = spaces.make_problem(STUDENTS, limits)
    feasible = {policy for policy in COSTS if problem.feasible(policy)}
    assert feasible == within(limits)
    for policy in list(COSTS)[::17]:
        for metric, value in problem.total(policy).items():
            if metric != "activation_memory":
                assert value == pytest.approx(COSTS[policy][metric])
        projected = problem.projected(policy)
        assert projected in feasible
        assert projected == policy or policy not in feasible


def test_the_worst_layer_may_be_the_only_budget():
    limits = {
        "activation_memory": float(np.median([c["activation_memory"] for c in COSTS.values()]))
    }
    problem = spaces.make_problem(STUDENTS, limits)
    assert {policy for policy in COSTS if problem.feasible(policy)} == within(limits)
    assert 0 < len(within(limits)) < len(COSTS)
    for name in NAMES:
        found = make(name, problem, seed=0, evaluations=4).propose()
        assert set(found) <= within(limits), name
        assert found or name == "uniform"


@pytest.mark.parametrize("name", NAMES)
def test_searchers_keep_budgets_of_real_layers(name):
    for seed in range(8):
        limits = budgets(seed)
        searcher = make(name, spaces.make_problem(STUDENTS, limits), seed=seed, evaluations=12)
        found = []
        while policies := searcher.propose():
            searcher.observe(policies, [float(sum(policy)) for policy in policies])
            found += policies
        assert set(found) <= within(limits), limits


@pytest.mark.parametrize("limit", [2000.0, 700.0])
def test_the_best_of_two_students_by_brute_force(limit):
    limits = {"weight_memory": limit, "activation_memory": 800.0}
    problem = spaces.make_problem(STUDENTS, limits)

    def predicted(policy):
        own = STUDENTS[policy[0]]
        values = zip(own.sensitivity, policy[1:], strict=True)
        return own.base + sum(of[option] for of, option in values)

    best = min(within(limits), key=predicted)
    (found,) = make("knapsack", problem, seed=0, evaluations=1).propose()
    assert found == best
    assert problem.predicted(found) == pytest.approx(predicted(best))


def test_a_student_that_no_bits_make_small_enough_leaves_the_other():
    least = {s: min(c["activation_memory"] for p, c in COSTS.items() if p[0] == s) for s in (0, 1)}
    assert least[1] < least[0]
    limits = {"activation_memory": (least[0] + least[1]) / 2}
    problem = spaces.make_problem(STUDENTS, limits)
    assert {policy for policy in COSTS if problem.feasible(policy)} == within(limits)
    assert {policy[0] for policy in within(limits)} == {1}
    for name in NAMES:
        if name != "uniform":
            found = make(name, problem, seed=0, evaluations=4).propose()
            assert found, name
            assert set(found) <= within(limits), name


def nearest(message):
    parts = message.split("the nearest that one keeps: ")[1].split(" (")[0].split(", ")
    return {m: float(v) for m, v in (part.split(" <= ") for part in parts)}


@pytest.mark.parametrize("metric", COUNTED)
def test_the_nearest_budget_is_one_that_is_kept_and_no_less_is(metric):
    least = min(costs[metric] for costs in COSTS.values())
    with pytest.raises(
        InfeasibleError, match=f"no policy keeps the budgets {metric} <= "
    ) as caught:
        spaces.make_problem(STUDENTS, {metric: least / 3})
    named = nearest(str(caught.value))
    assert within(named)
    assert not within({metric: named[metric] * (1 - 1e-5)})
    assert spaces.make_problem(STUDENTS, named).reserve in within(named)


def test_shares_are_of_the_costliest_student_at_its_last_choices():
    found = spaces.limits_of(STUDENTS, {"bops": 1e6}, {"weight_memory": 0.25})
    assert found == {"bops": 1e6, "weight_memory": 0.25 * COSTS[0, 3, 3, 3]["weight_memory"]}
    assert COSTS[0, 3, 3, 3]["weight_memory"] > COSTS[1, 3, 3, 3]["weight_memory"]


def test_budgets_that_are_not_clear_are_refused():
    with pytest.raises(ConfigError, match=r"'size'.*valid: average_bits, bops"):
        spaces.limits_of(STUDENTS, {"size": 1.0}, {})
    with pytest.raises(ConfigError, match=r"two budgets each of \['bops'\]"):
        spaces.limits_of(STUDENTS, {"bops": 1.0}, {"bops": 0.5})


def test_students_of_other_layers_are_refused():
    deeper = make_student("deeper", (4, 4, 4))
    with pytest.raises(ConfigError, match="students 'wide' and 'deeper' differ in layers"):
        spaces.make_problem([STUDENTS[0], deeper], {"bops": 1e9})


def test_decisions_are_the_student_the_layers_and_the_terms():
    problem = spaces.make_problem(STUDENTS, {"bops": 1e9}, ["kl", "hints"])
    assert [one.name for one in problem.decisions] == [
        *("student", "conv_0", "conv_1", "head", "distill/kl", "distill/hints")
    ]
    assert problem.decisions[0].options == ("wide", "narrow")
    assert problem.decisions[-1].options == ("off", "on")
    # What is distilled costs nothing.
    off, on = (1, 0, 0, 0, 0, 0), (1, 0, 0, 0, 1, 1)
    assert problem.total(off) == problem.total(on)
    # Bits by rank: 2, 4, 8 of weights, and so of inputs.
    places = dict(zip(problem.decisions[1].options, problem.decisions[1].places, strict=True))
    assert places == {"W2A4": (0, 0.5), "W4A8": (0.5, 1), "W8A2": (1, 0), "W8A8": (1, 1)}


def test_features_say_what_a_layer_is():
    problem = spaces.make_problem(STUDENTS, {"bops": 1e9}, ["kl"])
    student, conv, head, term = problem.features[0, [0, 2, 3, 4]]
    assert student.tolist() == [1] + [0] * 11
    assert term.tolist() == [0, 1] + [0] * 10
    # conv_1: 8 to 12 channels, 4×4 positions, 3×3 kernel.
    sizes = [math.log2(8) / 12, math.log2(12) / 12, 4 / 16, math.log2(9) / 6]
    sizes += [math.log2(16 * 9 * 96) / 36, math.log2(9 * 96) / 24]
    np.testing.assert_allclose(conv, [0, 0, 0, 1, 0, 0, *sizes], rtol=1e-6)
    np.testing.assert_allclose(
        head[:9], [0, 0, 1, 0, 0, 0, math.log2(12) / 12, *head[7:9]], rtol=1e-6
    )
    assert problem.features[1, 2, 6] == pytest.approx(2 / 12)


def test_without_sensitivities_there_is_nothing_to_predict():
    plain = [dataclasses.replace(one, sensitivity=None) for one in STUDENTS]
    problem = spaces.make_problem(plain, {"bops": 1e9})
    assert problem.sensitivity is None
    assert problem.base is None


def test_pairs_are_of_their_student_and_layers():
    first = dataclasses.replace(STUDENTS[0], pairs={(0, 1, 2, 3): 0.5})
    problem = spaces.make_problem([first, STUDENTS[1]], {"bops": 1e9})
    plain = spaces.make_problem(STUDENTS, {"bops": 1e9})
    for policy in [(0, 1, 0, 3), (1, 1, 0, 3), (0, 1, 1, 2)]:
        more = problem.predicted(policy) - plain.predicted(policy)
        assert more == pytest.approx(0.5 if policy == (0, 1, 0, 3) else 0)
