"""The end of a search: files of its best policies, measured, before one of them is chosen."""

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
    """The best policy whose own file keeps the budgets, and what was measured of that.

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
    distinct = list({one.policy: one for one in evaluations}.values())
    ranked = sorted(distinct, key=lambda one: rank(one, search.objective, problem))
    nearest = ""
    for start in range(0, len(ranked), search.finalists):
        part = ranked[start : start + search.finalists]
        for one, found in zip(part, _measure(part, problem, search, files, tables), strict=True):
            over = [metric for metric, value in found.items() if value > problem.limits[metric]]
            if not over:
                return one, found
            nearest = nearest or f"the best has {over[0]} {found[over[0]]:g}"
    raise InfeasibleError(
        f"none of {len(ranked)} policies keeps the budgets {dict(problem.limits)} when its file is "
        f"measured; {nearest}"
    )


def _measure(
    policies: Sequence[Evaluation],
    problem: Problem,
    search: Search,
    files: Sequence[Files],
    tables: Sequence[CostTable],
) -> list[Measured]:
    found: list[Measured] = [{} for _ in policies]
    for i, one in enumerate(policies):
        if "size" in problem.limits:
            found[i]["size"] = float(files[one.policy[0]].size(files[one.policy[0]].of(one.policy)))
    if "latency" not in problem.limits:
        return found
    for s, (own, table) in enumerate(zip(files, tables, strict=True)):
        places = [i for i, one in enumerate(policies) if one.policy[0] == s]
        if not places:
            continue
        largest = {path: choices[-1] for path, choices in own.choices.items()}
        taken = own.seconds(
            [largest, *(own.of(policies[i].policy) for i in places)],
            runtime=search.runtime,
            batch=search.batch,
            cores=latency.cores(search.threads),
        )
        # As fast as the machine was when the table was made, by what the largest takes now.
        unit = table.total("latency", largest) / np.median(taken[0])
        for i, times in zip(places, taken[1:], strict=True):
            found[i]["latency"] = float(unit * np.median(times))
    return found
