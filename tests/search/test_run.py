"""A search that is cut off goes on to exactly what it would have found."""

import json
import zlib

import pytest
from problems import layered

from kdq import files
from kdq.search import run
from kdq.search.problem import InfeasibleError
from kdq.search.run import History
from kdq.search.searchers import METHODS, make

PROBLEM = layered(layers=5, bits=(2, 4, 8), students=2, metrics=2, budget=0.8)
EVALUATIONS = 18
OPTIONS = {
    "knapsack": {"pool": 18},
    "knapsack_pairwise": {"pool": 18},
    "nsga2": {"population": 8},
    "tpe": {"startup": 6},
    "ddpg": {"hidden": (8,), "updates": 2, "batch_size": 8, "replay": 16},
    "ppo": {"hidden": (8,), "epochs": 2},
}


class Cut(Exception):
    """The process ends here."""


class Scores:
    """Numbers that depend on the policy alone, and on what the sensitivities leave out."""

    def __init__(self, cut_at=None):
        self.calls, self.cut_at = [], cut_at

    def __call__(self, policies):
        found = []
        for policy in policies:
            if len(self.calls) == self.cut_at:
                raise Cut
            self.calls.append(policy)
            noise = zlib.crc32(repr(policy).encode()) / 2**32
            value = PROBLEM.predicted(policy) * (1 + 0.1 * noise)
            found.append({"kl": value, "error": noise})
        return found


def search(path, name, *, seed=0, scores=None, evaluations=EVALUATIONS, objective="kl", **more):
    options = OPTIONS.get(name, {})
    searcher = make(name, PROBLEM, seed=seed, evaluations=evaluations, **options)
    scores = scores or Scores()
    with History(path) as history:
        return run.run(
            PROBLEM,
            searcher,
            scores,
            history,
            objective=objective,
            evaluations=evaluations,
            **more,
        )


def comparable(path):
    """What the log says, but for the times."""
    return [
        files.unseal(json.loads(line)) | {"seconds": 0} for line in path.read_text().splitlines()
    ]


@pytest.mark.parametrize("name", METHODS)
def test_after_a_cut_it_goes_on_to_the_same(name, tmp_path):
    whole = search(tmp_path / "whole", name)
    few = name in ("uniform", "greedy")  # which have less to propose
    assert len(whole) == EVALUATIONS or few
    for cut_at in (0, 1, 8, 11):  # in the midst of what was proposed together, and at its end
        if cut_at >= len(whole):
            break
        path = tmp_path / f"cut-{cut_at}"
        with pytest.raises(Cut):
            search(path, name, scores=Scores(cut_at))
        lines = path.read_text().splitlines()
        policies = {tuple(json.loads(line)["policy"]) for line in lines}
        assert len(policies) == cut_at  # every one was on disk before the next began
        with open(path, "a") as file:
            file.write('{"policy": [0, 1')  # what the process was writing when it died
        again = Scores()
        search(path, name, scores=again)
        assert comparable(path) == comparable(tmp_path / "whole")
        assert not policies & set(again.calls)  # nothing twice


def test_a_finished_search_is_only_read(tmp_path):
    whole = search(tmp_path / "log", "tpe")
    scores = Scores()
    assert search(tmp_path / "log", "tpe", scores=scores) == whole
    assert scores.calls == []


@pytest.mark.parametrize("at_once", [3, 8])
def test_what_is_evaluated_together_changes_nothing(at_once, tmp_path):
    search(tmp_path / "one", "random")
    search(tmp_path / "more", "random", at_once=at_once)
    assert comparable(tmp_path / "more") == comparable(tmp_path / "one")
    with pytest.raises(Cut):
        search(tmp_path / "cut", "random", at_once=at_once, scores=Scores(17))
    log = comparable(tmp_path / "cut")
    assert len(log) >= 17 - at_once  # but for those that were with it
    assert log == comparable(tmp_path / "one")[: len(log)]


def test_the_log_of_another_search_is_refused(tmp_path):
    search(tmp_path / "log", "random", seed=1)
    before = (tmp_path / "log").read_bytes()
    with pytest.raises(ValueError, match="its log is of another search: delete it"):
        search(tmp_path / "log", "random", seed=2)
    assert (tmp_path / "log").read_bytes() == before


def test_it_tells_the_best_so_far(tmp_path):
    told = []
    found = search(
        tmp_path / "log",
        "random",
        objective="error",
        on_evaluated=lambda count, best: told.append((count, best.scores["error"])),
    )
    errors = [one.scores["error"] for one in found]
    assert told == [(i + 1, min(errors[: i + 1])) for i in range(len(errors))]


def test_equal_scores_are_decided_by_what_is_used(tmp_path):
    found = search(
        tmp_path / "log", "random", scores=lambda policies: [{"kl": 1.0}] * len(policies)
    )
    best = min(found, key=lambda one: one.rank("kl", PROBLEM))
    used = lambda one: sum(one.costs[m] / limit for m, limit in PROBLEM.limits.items())
    assert used(best) == pytest.approx(min(map(used, found)))
    assert used(best) < max(map(used, found))


def test_lines_say_what_was_tried(tmp_path):
    for line in comparable_lines(tmp_path):
        policy = tuple(line["policy"])
        assert line["chosen"] == PROBLEM.describe(policy)
        assert line["costs"] == PROBLEM.total(policy)
        assert line["scores"] == Scores()([policy])[0]


def comparable_lines(folder):
    search(folder / "log", "nsga2")
    return comparable(folder / "log")


def test_a_searcher_without_a_policy_within_the_budgets(tmp_path):
    class Nothing:
        def propose(self):
            return []

    with (
        History(tmp_path / "log") as history,
        pytest.raises(InfeasibleError, match="Nothing has no"),
    ):
        run.run(PROBLEM, Nothing(), Scores(), history, objective="kl", evaluations=3)
