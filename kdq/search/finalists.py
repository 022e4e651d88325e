"""The end of a search: the files of its best policies, measured, before one of them is chosen."""

from collections.abc import Sequence

import numpy as np

from kdq.config import Search
from kdq.deploy.measure import latency
from kdq.search.cost import CostTable
from kdq.search.history import Evaluation
from kdq.search.measured import Files
from kdq.search.problem import InfeasibleError, Problem
from kdq.search.run import rank

Measured = dict[str, float]  # {"size", "latency"}, those that have a budget


def choose(
    problem: Problem,
    evaluations: Sequence[Evaluation],
    search: Search,
    files: Sequence[Files],
    tables: Sequence[CostTable],
) -> tuple[Evaluation, Measured]:
    """Returns the best policy whose own file keeps the budgets, and the measurements of that file.

    Sizes and latencies of a table are predictions. The best few policies are written and timed, and
    if none of them keeps the budgets the next few.

    Args:
      problem: with the budgets.
      evaluations: of the search.
      search: its objective, how many finalists there are, and where they run.
      files: of each student.
      tables: of each student.

    Raises:
      InfeasibleError: no evaluated policy keeps the budgets when measured.
    """
    distinct = {evaluation.policy: evaluation for evaluation in evaluations}
    ranked = sorted(distinct.values(), key=lambda e: rank(e, search.objective, problem))
    nearest = ""
    for start in range(0, len(ranked), search.finalists):
        part = ranked[start : start + search.finalists]
        measured = _measure(part, problem, search, files, tables)
        for finalist, values in zip(part, measured, strict=True):
            over = [metric for metric, value in values.items() if value > problem.limits[metric]]
            if not over:
                return finalist, values
            nearest = nearest or f"the best has {over[0]} {values[over[0]]:g}"
    raise InfeasibleError(
        f"none of {len(ranked)} policies keeps the budgets {dict(problem.limits)} when its file is "
        f"measured; {nearest}"
    )


def _measure(
    finalists: Sequence[Evaluation],
    problem: Problem,
    search: Search,
    files: Sequence[Files],
    tables: Sequence[CostTable],
) -> list[Measured]:
    measured: list[Measured] = [{} for _ in finalists]
    chosen = [files[e.policy[0]].choose(e.policy) for e in finalists]
    if "size" in problem.limits:
        for i, evaluation in enumerate(finalists):
            measured[i]["size"] = float(files[evaluation.policy[0]].size(chosen[i]))
    if "latency" not in problem.limits:
        return measured
    for s, table in enumerate(tables):
        places = [i for i, evaluation in enumerate(finalists) if evaluation.policy[0] == s]
        if not places:
            continue
        largest = {path: choices[-1] for path, choices in files[s].choices.items()}
        first, *times = files[s].seconds(
            [largest, *(chosen[i] for i in places)],
            runtime=search.runtime,
            batch=search.batch,
            cores=latency.cores(search.threads),
        )
        # As fast as the machine was when the table was made, by what the largest takes now.
        unit = table.total("latency", largest) / np.median(first)
        for i, seconds in zip(places, times, strict=True):
            measured[i]["latency"] = float(unit * np.median(seconds))
    return measured
