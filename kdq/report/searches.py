"""Searches: policies layer by layer, and methods against each other at each budget."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.text import Text

from kdq.record import ArmRecord
from kdq.report import notes
from kdq.report.aggregate import Mean, Records, Row, as_records
from kdq.report.cells import (
    ABSENT,
    difference_cell,
    escape,
    format_bytes,
    markdown_grid,
    mean_cell,
    standard_output,
    terminal_grid,
)
from kdq.search.cost import CostTable
from kdq.search.spaces import DISTILLED

Result = Mapping[str, Any]  # of a search, as a record has it
STAGES = ("ptq", "qad")
HEAD = ("Search", "Evaluations", "Seconds", "Objective", "Size", "PTQ", "Δ PTQ", "QAD", "Δ QAD")


def print_policies(records: Records) -> None:
    """Prints each search's choice, a column a seed, with its costs and scores.

    Beside it stands what the best uniform bits under the same budgets have.
    """
    records = as_records(records)
    console, searches = standard_output(), _results(records)
    compared = {_uniform(r).get("name") for results in searches.values() for r in results.values()}
    for name, results in searches.items():
        if name in compared:
            continue  # it stands beside the other
        seeds = sorted(results)
        head = (name, *(f"seed {seed}" for seed in seeds))
        grid = terminal_grid(head, head)
        for row in _policy_rows([results[seed] for seed in seeds]):
            grid.add_row(*row)
        console.print(grid)
    if note := notes.against_uniform(records):
        console.print(Text(note))


def print_costs(table: CostTable) -> None:
    """Prints a cost table, a grid a metric."""
    console = standard_output()
    for metric, costs in table.metrics.items():
        labels = list(dict.fromkeys(bits for layer in costs.layers.values() for bits in layer))
        grid = terminal_grid((metric, *(bits or "float" for bits in labels)), (metric,))
        for path, layer in costs.layers.items():
            grid.add_row(path, *(f"{layer[b]:.5g}" if b in layer else ABSENT for b in labels))
        grid.add_row("beside layers", f"{costs.constant:.5g}", *[""] * (len(labels) - 1))
        console.print(grid)
    if table.conditions:
        console.print(", ".join(f"{k} {v}" for k, v in table.conditions.items()))


def _results(records: Sequence[ArmRecord]) -> dict[str, dict[int, Result]]:
    """Returns {search: {seed: its result}}."""
    results: dict[str, dict[int, Result]] = {}
    for record in records:
        if record.search:
            results.setdefault(record.search["name"], {})[record.seed] = record.search
    return results


def _policy_rows(results: Sequence[Result]) -> Iterable[list[str]]:
    for name in dict.fromkeys(name for result in results for name in result["chosen"]):
        yield [name, *(result["chosen"].get(name, ABSENT) or "float" for result in results)]
    for metric in results[0]["limits"]:
        costs = [{**result["costs"], **result["measured"]}[metric] for result in results]
        limits = [result["limits"][metric] for result in results]
        pairs = zip(costs, limits, strict=True)
        yield [metric, *(f"{cost:.4g} of {limit:.4g}" for cost, limit in pairs)]
    objective = results[0]["objective"]
    yield [f"{objective}, held out", *(_score(result, objective) for result in results)]
    if any(map(_uniform, results)):
        uniform = [_uniform(result) for result in results]
        yield [f"{objective}, uniform bits", *(_score(result, objective) for result in uniform)]
        yield ["uniform bits", *map(_bits, uniform)]
    yield ["evaluations", *(str(_effort(result)[0]) for result in results)]
    yield ["seconds", *(f"{_effort(result)[1]:.1f}" for result in results)]


def _uniform(result: Result) -> Result:
    """Returns what a search says of the best uniform bits; nothing, if it does not."""
    return result.get("uniform") or {}


def _score(result: Result, objective: str) -> str:
    return f"{result['scores'][objective]:.4g}" if result else ABSENT


def _bits(uniform: Result) -> str:
    """Returns the bits of most layers, the others by layer, and if the policy is the same."""
    if not uniform:
        return ABSENT
    chosen = uniform["chosen"].items()
    layers = {k: v for k, v in chosen if k != "student" and not k.startswith(DISTILLED)}
    ((most, _),) = Counter(layers.values()).most_common(1)
    others = [f"{path} {bits or 'float'}" for path, bits in layers.items() if bits != most]
    text = f"{most or 'float'}{', but ' if others else ''}{', '.join(others)}"
    return f"{text}: the same policy" if uniform["same"] else text


def _effort(result: Result) -> tuple[int, float]:
    """Returns evaluations, of sensitivities too, and seconds."""
    seconds = result["prepare_seconds"] + result["seconds"]
    return result["evaluations"] + result["sensitivity_evaluations"], seconds


def markdown(records: Records, table: Sequence[Row]) -> str:
    """Returns a study of searches, a part a budget; "" if there is none.

    Its searches have two arms each, by their name with "_ptq" and "_qad" after it.

    Args:
      records: of all arms.
      table: the same, aggregated.
    """
    records, arms = as_records(records), {row.arm: row for row in table}
    searches = {
        name: results
        for name, results in _results(records).items()
        if all(f"{name}_{stage}" in arms for stage in STAGES)
    }
    budgets: dict[str, list[str]] = {}
    for name, results in searches.items():
        # A share of what the student costs differs from seed to seed: those of the first.
        limits = results[min(results)]["limits"].items()
        budget = ", ".join(f"{metric} ≤ {limit:.4g}" for metric, limit in limits)
        budgets.setdefault(budget, []).append(name)
    lines = []
    for budget, names in budgets.items():
        if len(names) > 1:
            cells = [_cells(name, list(searches[name].values()), arms) for name in names]
            lines += ["", f"**{escape(budget)}**", "", *markdown_grid(HEAD, cells, ("Search",))]
    if not lines:
        return ""
    baselines = dict.fromkeys(filter(None, (arms[f"{name}_ptq"].reference for name in searches)))
    apart = all("compile_seconds" in r for results in searches.values() for r in results.values())
    names, over = escape(", ".join(baselines)), notes.coverage(table)
    intro = notes.texts().searches(table[0].metric, names, over, apart)
    note = notes.against_uniform(records)
    return "\n".join([intro, *lines, *(["", escape(note)] if note else []), ""])


def _cells(name: str, results: Sequence[Result], arms: Mapping[str, Row]) -> list[str]:
    stages = [arms[f"{name}_{stage}"] for stage in STAGES]
    evaluations, seconds = map(statistics.fmean, zip(*map(_effort, results), strict=True))
    objective = Mean.over(result["scores"][result["objective"]] for result in results)
    cells = [escape(name), f"{evaluations:.0f}", f"{seconds:.1f}", mean_cell(objective, 4)]
    cells.append(format_bytes(stages[0].size_bytes))
    for row in stages:
        cells += [mean_cell(row.score, row.metric.decimals), escape(difference_cell(row))]
    return cells
