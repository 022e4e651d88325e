"""The search: a searcher proposes policies, which are evaluated and logged."""

from collections.abc import Callable, Mapping, Sequence

from kdq.search.history import Evaluation, History
from kdq.search.problem import InfeasibleError, Policy, Problem
from kdq.search.searcher import Searcher
from kdq.stopwatch import Stopwatch

# Policies -> of each its scores by objective, less being better.
Score = Callable[[Sequence[Policy]], list[Mapping[str, float]]]
OnEvaluated = Callable[[int, Evaluation], None]


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
            best = better(best, history.evaluations[count], objective, problem)
            count += 1
            on_evaluated(count, best)
        searcher.observe(policies, [float(scores[policy][objective]) for policy in policies])
    if not count:
        raise InfeasibleError(
            f"{type(searcher).__name__} has no policy that keeps the budgets {dict(problem.limits)}"
        )
    return history.evaluations[:count]


def better(
    best: Evaluation | None, other: Evaluation, objective: str, problem: Problem
) -> Evaluation:
    """Returns the one with less of the objective; of equals the one with less of its budgets."""
    return other if best is None else min(best, other, key=lambda e: rank(e, objective, problem))


def rank(evaluation: Evaluation, objective: str, problem: Problem) -> tuple[float, float]:
    """Returns a key that sorts evaluations, the best first."""
    used = sum(evaluation.costs[m] / (abs(limit) or 1.0) for m, limit in problem.limits.items())
    return evaluation.scores[objective], used
