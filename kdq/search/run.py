"""The search: a searcher proposes policies, which are evaluated and logged.

The log has a line of JSON an evaluation; a search that was killed resumes from it.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kdq import files
from kdq.search.problem import InfeasibleError, Policy, Problem
from kdq.search.searcher import Searcher
from kdq.stopwatch import Stopwatch

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A policy that was tried."""

    policy: Policy
    chosen: Mapping[str, str]  # the same by names
    scores: Mapping[str, float]  # by objective
    costs: Mapping[str, float]  # by metric
    seconds: float  # since the search began, of all its processes

    def rank(self, objective: str, problem: Problem) -> tuple[float, float]:
        """Returns a key that sorts evaluations, the best first: of equals with less of budgets."""
        used = sum(self.costs[m] / (abs(limit) or 1.0) for m, limit in problem.limits.items())
        return self.scores[objective], used


# Policies -> of each its scores by objective, less being better.
Score = Callable[[Sequence[Policy]], list[Mapping[str, float]]]
OnEvaluated = Callable[[int, Evaluation], None]


class History(contextlib.AbstractContextManager):
    """Evaluations in the order in which they were made; on disk before the next one begins."""

    def __init__(self, path: Path):
        """Opens the log; from the first line that is damaged or cut off it is made again."""
        self._path, size = path, 0
        self.evaluations: list[Evaluation] = []
        lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for number, line in enumerate(lines[:-1], start=1):  # after the last end nothing counts
            try:
                fields = files.unseal(files.parse(line.decode()))
                evaluation = Evaluation(**{**fields, "policy": tuple(fields["policy"])})
                numbers = {**evaluation.scores, **evaluation.costs, "seconds": evaluation.seconds}
                for name, value in numbers.items():
                    if not isinstance(value, int | float):
                        raise TypeError(f"{name}={value!r} is no number")
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                log.warning(
                    "%s, line %d: damaged (%s); from there on made again", path, number, error
                )
                break
            self.evaluations.append(evaluation)
            size += len(line) + 1
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 closed by `__exit__`
        self._file.truncate(size)

    def add(self, evaluation: Evaluation) -> None:
        line = files.json_text(dataclasses.asdict(evaluation), indent=None)
        with files.named_errors(self._path):
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.evaluations.append(evaluation)

    def __exit__(self, *_: object) -> None:
        self._file.close()


def run(
    problem: Problem,
    searcher: Searcher,
    score: Score,
    history: History,
    *,
    objective: str,
    evaluations: int,
    at_once: int = 1,
    on_evaluated: OnEvaluated = lambda count, best: None,
) -> list[Evaluation]:
    """Searches; returns all evaluations, those of `history` first.

    Replays the log: while the searcher proposes logged policies it is given the logged scores.

    Args:
      problem: with the budgets.
      searcher: of it; new.
      score: evaluates policies.
      history: of a search that was begun with the same searcher and seed, or empty.
      objective: which of the scores the searcher is given.
      evaluations: at most so many.
      at_once: policies that are evaluated together; they are logged before the next ones are.
      on_evaluated: called after each, with the number of evaluations and the best so far.

    Raises:
      InfeasibleError: the searcher has no policy that keeps the budgets.
      ValueError: the log is of another search.
    """
    known = list(history.evaluations)
    scores = {logged.policy: logged.scores for logged in known}
    before = known[-1].seconds if known else 0.0
    watch, count, best = Stopwatch(), 0, None
    while count < evaluations:
        policies = list(searcher.propose())[: evaluations - count]
        if not policies:
            break
        for policy, logged in zip(policies, known[count:], strict=False):
            if policy != logged.policy:
                raise ValueError("its log is of another search: delete it to search again")
        for place, policy in enumerate(policies):
            if place % at_once == 0:
                part = policies[place : place + at_once]
                new = list(dict.fromkeys(p for p in part if p not in scores))
                for proposed in new:
                    assert problem.feasible(proposed), f"{type(searcher)} proposed {proposed}"
                if new:
                    scores |= dict(zip(new, score(new), strict=True))
            if count == len(history.evaluations):
                evaluation = Evaluation(
                    policy=policy,
                    chosen=problem.describe(policy),
                    scores=scores[policy],
                    costs=problem.total(policy),
                    seconds=before + watch.working,
                )
                history.add(evaluation)
            other = history.evaluations[count]
            best = min(best or other, other, key=lambda e: e.rank(objective, problem))
            count += 1
            on_evaluated(count, best)
        searcher.observe(policies, [float(scores[policy][objective]) for policy in policies])
    if not count:
        raise InfeasibleError(
            f"{type(searcher).__name__} has no policy that keeps the budgets {dict(problem.limits)}"
        )
    return history.evaluations[:count]
