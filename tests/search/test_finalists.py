"""Files of the best policies, measured: a prediction is not enough."""

import numpy as np
import pytest

from kdq.config import Search
from kdq.search import measured
from kdq.search.cost import CostTable, Metric
from kdq.search.problem import Decision, InfeasibleError, Problem
from kdq.search.run import Evaluation

OPTIONS = ("W2", "W4", "W8")
CHOICES = {"a": OPTIONS, "b": OPTIONS}


def make_problem(limits, students=1):
    """Predicted costs: a byte for each place of an option, a millisecond likewise."""
    shape = (students, 3, 3)
    valid = np.ones(shape, bool)
    valid[:, 0, students:] = False
    cost = np.zeros(shape)
    cost[:, 1:] = np.arange(3.0)
    names = tuple("xyz"[:students])
    nowhere = tuple((0.0, 0.0) for _ in range(3))
    return Problem(
        decisions=(
            Decision(name="student", options=names, places=nowhere[:students], kind="student"),
            *(Decision(name=path, options=OPTIONS, places=nowhere) for path in "ab"),
        ),
        valid=valid,
        costs={"size": cost, "latency": cost},
        constants={metric: np.zeros(students) for metric in ("size", "latency")},
        limits=limits,
        features=np.zeros((students, 3, 1)),
    )


def evaluated(problem, policies):
    """The first is the best."""
    return [
        Evaluation(
            policy=policy,
            chosen=problem.describe(policy),
            scores={"kl": float(i)},
            costs=problem.total(policy),
            seconds=0.0,
        )
        for i, policy in enumerate(policies)
    ]


class Files:
    """Of known sizes and times; notes what was asked."""

    choices = CHOICES

    def __init__(self, sizes=None, seconds=None, slower=1.0):
        self._sizes, self._seconds, self._slower = sizes, seconds, slower
        self.asked = []

    def choose(self, policy):
        return {path: OPTIONS[place] for path, place in zip("ab", policy[1:], strict=True)}

    def size(self, chosen):
        self.asked.append(tuple(chosen.values()))
        return self._sizes[tuple(chosen.values())]

    def seconds(self, policies, *, runtime, batch, cores):
        self.asked.append([tuple(one.values()) for one in policies])
        assert (runtime, batch, len(cores)) == ("onnx", 2, 1)
        own = [self._slower * self._seconds[tuple(one.values())] for one in policies]
        return [np.array([value, value, 9 * value]) for value in own]


TABLE = CostTable(
    model={},
    image_shape=(),
    metrics={
        "latency": Metric(
            layers={path: dict(zip(OPTIONS, (0.0, 1.0, 2.0), strict=True)) for path in "ab"}
        )
    },
)
SEARCH = Search(students=("x",), batch=2, finalists=2)


def choose(problem, policies, files, search=SEARCH):
    tables = [TABLE] * len(files)
    return measured.choose_finalist(problem, evaluated(problem, policies), search, files, tables)


def test_the_best_whose_file_is_too_large_is_passed_over():
    problem = make_problem({"size": 3.0})
    sizes = {("W4", "W8"): 3.5, ("W8", "W4"): 4.0, ("W2", "W8"): 3.0, ("W2", "W4"): 1.0}
    files = Files(sizes)
    best = [(0, 1, 2), (0, 2, 1), (0, 0, 2), (0, 0, 1)]
    found, told = choose(problem, best, [files])
    assert found.policy == (0, 0, 2)
    assert told == {"size": 3.0}
    assert files.asked == list(sizes)  # two by two, and no more than it takes


def test_no_more_files_than_finalists_if_the_best_fits():
    files = Files({("W4", "W8"): 1.0, ("W8", "W4"): 1.0})
    found, _ = choose(make_problem({"size": 3.0}), [(0, 1, 2), (0, 2, 1), (0, 0, 2)], [files])
    assert found.policy == (0, 1, 2)
    assert len(files.asked) == 2


def test_a_policy_that_was_tried_twice_is_measured_once():
    files = Files({("W4", "W8"): 9.0, ("W2", "W2"): 1.0})
    found, _ = choose(make_problem({"size": 3.0}), [(0, 1, 2), (0, 1, 2), (0, 0, 0)], [files])
    assert found.policy == (0, 0, 0)
    assert files.asked == [("W4", "W8"), ("W2", "W2")]


def test_none_that_fits_says_how_near_the_best_is():
    problem = make_problem({"size": 3.0})
    files = Files({("W4", "W8"): 3.25, ("W2", "W2"): 7.0})
    with pytest.raises(InfeasibleError, match=r"none of 2 policies.*the best has size 3\.25"):
        choose(problem, [(0, 1, 2), (0, 0, 0)], [files])


def test_without_a_budget_on_files_none_is_written():
    files = Files()
    problem = make_problem({})
    found, told = choose(problem, [(0, 1, 2), (0, 0, 0)], [files])
    assert (found.policy, told, files.asked) == ((0, 1, 2), {}, [])


def test_times_are_in_units_of_the_table():
    """The machine is three times slower now: what counts is how policies compare."""
    problem = make_problem({"latency": 3.0})
    times = {("W8", "W8"): 4.0, ("W4", "W8"): 3.5, ("W8", "W4"): 2.5, ("W2", "W2"): 0.5}
    for slower in (1e-3, 3e-3):
        files = Files(seconds=times, slower=slower)
        found, told = choose(problem, [(0, 1, 2), (0, 2, 1), (0, 0, 0)], [files])
        assert found.policy == (0, 2, 1)
        assert told["latency"] == pytest.approx(2.5)
        assert files.asked == [[("W8", "W8"), ("W4", "W8"), ("W8", "W4")]]


def test_each_student_has_its_own_files():
    problem = make_problem({"size": 3.0}, students=2)
    files = [Files({("W4", "W8"): 5.0}), Files({("W4", "W8"): 2.0, ("W2", "W2"): 1.0})]
    found, told = choose(problem, [(0, 1, 2), (1, 1, 2), (1, 0, 0)], files)
    assert found.policy == (1, 1, 2)
    assert told == {"size": 2.0}
    assert (files[0].asked, files[1].asked[0]) == ([("W4", "W8")], ("W4", "W8"))
