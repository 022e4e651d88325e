"""What searches found: policies layer by layer, and methods against each other at each budget."""

import collections
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.text import Text

from kdq.evaluate.statistics import summary
from kdq.report import Record, notes
from kdq.report.aggregate import Mean, Row
from kdq.report.cells import (
    ABSENT,
    escape,
    format_bytes,
    markdown_grid,
    mean_cell,
    standard_output,
    terminal_grid,
)
from kdq.report.table import difference_cell
from kdq.search.cost import CostTable
from kdq.search.spaces import DISTILLED


def print_policies(records: Sequence[Record]) -> None:
    """Prints each search's choice, a column a seed, with its costs and scores, and what the best
    uniform bits under the same budgets have."""
    console = standard_output()
    searches = _searches(records)
    compared = {_uniform(one).get("name") for found in searches.values() for one in found.values()}
    for name, found in searches.items():
        if name in compared:
            continue  # it stands beside the other
        seeds = sorted(found)
        grid = terminal_grid()
        for title in (name, *(f"seed {seed}" for seed in seeds)):
            grid.add_column(title, justify="left")
        for row in _policy_rows([found[seed] for seed in seeds]):
            grid.add_row(*row)
        console.print(grid)
    if said := notes.against_uniform(records):
        console.print(Text(said))


def print_costs(table: CostTable) -> None:
    """Prints a cost table, a grid a metric."""
    console = standard_output()
    for metric, own in table.metrics.items():
        labels = list(dict.fromkeys(bits for of in own.layers.values() for bits in of))
        grid = terminal_grid()
        grid.add_column(metric)
        for bits in labels:
            grid.add_column(bits or "float", justify="right")
        for path, of in own.layers.items():
            grid.add_row(path, *(f"{of[b]:.5g}" if b in of else ABSENT for b in labels))
        grid.add_row("beside layers", f"{own.constant:.5g}", *[""] * (len(labels) - 1))
        console.print(grid)
    if table.conditions:
        console.print(", ".join(f"{k} {v}" for k, v in table.conditions.items()))


def _searches(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """{search: {seed: a record with what it found}}."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.get("search"):
            found.setdefault(record["search"]["name"], {})[record["seed"]] = record
    return found


def _policy_rows(found: Sequence[Record]) -> Iterable[list[str]]:
    chosen = [record["search"]["chosen"] for record in found]
    for name in dict.fromkeys(name for one in chosen for name in one):
        yield [name, *(one.get(name, ABSENT) or "float" for one in chosen)]
    told = [record["search"] for record in found]
    for metric in told[0]["limits"]:
        cost = [{**one["costs"], **one["measured"]}[metric] for one in told]
        limits = [one["limits"][metric] for one in told]
        pairs = zip(cost, limits, strict=True)
        yield [metric, *(f"{c:.4g} of {limit:.4g}" for c, limit in pairs)]
    objective = told[0]["objective"]
    yield [f"{objective}, held out", *(f"{one['scores'][objective]:.4g}" for one in told)]
    if any(_uniform(record) for record in found):
        uniform = [_uniform(record) for record in found]
        yield [f"{objective}, uniform bits", *(_score(one, objective) for one in uniform)]
        yield ["uniform bits", *(_bits(one) for one in uniform)]
    yield ["evaluations", *(str(_evaluations(one)) for one in told)]
    yield ["seconds", *(f"{_seconds(one):.1f}" for one in told)]


def _uniform(record: Record) -> Mapping[str, Any]:
    """Returns what a record says of the best uniform bits; nothing, if it does not."""
    return record["search"].get("uniform") or {}


def _score(uniform: Mapping[str, Any], objective: str) -> str:
    return f"{uniform['scores'][objective]:.4g}" if uniform else ABSENT


def _bits(uniform: Mapping[str, Any]) -> str:
    """Returns the bits that most layers have, the others by layer, and whether they are the same
    policy as what was found."""
    if not uniform:
        return ABSENT
    chosen = uniform["chosen"].items()
    layers = {k: v for k, v in chosen if k != "student" and not k.startswith(DISTILLED)}
    ((most, _),) = collections.Counter(layers.values()).most_common(1)
    others = [f"{path} {bits or 'float'}" for path, bits in layers.items() if bits != most]
    said = f"{most or 'float'}{', but ' if others else ''}{', '.join(others)}"
    return f"{said}: the same policy" if uniform["same"] else said


def _evaluations(told: Mapping) -> int:
    return told["evaluations"] + told["sensitivity_evaluations"]


def _seconds(told: Mapping) -> float:
    return told["prepare_seconds"] + told["seconds"]


STAGES = ("ptq", "qad")
HEAD = ("Search", "Evaluations", "Seconds", "Objective", "Size", "PTQ", "Δ PTQ", "QAD", "Δ QAD")


def markdown(records: Sequence[Record], table: Sequence[Row]) -> str:
    """A study of searches, a part a budget; "" if there is none.

    Its searches have two arms each, by their name with "_ptq" and "_qad" after it.

    Args:
      records: of all arms.
      table: the same, aggregated.
    """
    arms = {row.arm: row for row in table}
    found = {
        name: by_seed
        for name, by_seed in _searches(records).items()
        if all(f"{name}_{stage}" in arms for stage in STAGES)
    }
    budgets: dict[str, list[str]] = {}
    for name, by_seed in found.items():
        budgets.setdefault(_budget(by_seed), []).append(name)
    lines = []
    for budget, names in budgets.items():
        if len(names) > 1:
            cells = [_cells(name, found[name], arms) for name in names]
            lines += ["", f"**{escape(budget)}**", "", *markdown_grid(HEAD, cells, ("Search",))]
    if not lines:
        return ""
    reference = dict.fromkeys(
        row.reference for name in found for row in [arms[f"{name}_ptq"]] if row.reference
    )
    return "\n".join(
        [
            "Test accuracy, percent, mean ± standard deviation over seeds, calibrated (PTQ) and "
            "after the same training (QAD); Δ is to the same arm of the baseline "
            f"({escape(', '.join(reference))}, ...), paired by seed, with a 95% interval; \\* "
            "excludes 0. Objective: what policies are chosen by, on validation. Evaluations count "
            "those of sensitivities; seconds are of the search, calibration at each choice too "
            f"where it was the first of its seed, {_compiling(found)}.",
            *lines,
            *(["", f"{escape(said)}"] if (said := notes.against_uniform(records)) else []),
            "",
        ]
    )


def _compiling(found: Mapping[str, Mapping[int, Record]]) -> str:
    told = [record["search"] for by_seed in found.values() for record in by_seed.values()]
    apart = all("compile_seconds" in one for one in told)
    return "without compiling" if apart else "compiling included where records are old"


def _budget(by_seed: Mapping[int, Record]) -> str:
    """Limits in words; of a share of what the student costs, those of the first seed."""
    told = by_seed[min(by_seed)]["search"]
    return ", ".join(f"{metric} ≤ {limit:.4g}" for metric, limit in told["limits"].items())


def _cells(name: str, by_seed: Mapping[int, Record], arms: Mapping[str, Row]) -> list[str]:
    told = [record["search"] for record in by_seed.values()]
    of = [arms[f"{name}_{stage}"] for stage in STAGES]
    scores = [one["scores"][one["objective"]] for one in told]
    score = Mean(**dict(zip(("mean", "std"), summary(scores), strict=True)), n=len(scores))
    cells = [escape(name), f"{statistics.fmean(map(_evaluations, told)):.0f}"]
    cells += [f"{statistics.fmean(map(_seconds, told)):.1f}", mean_cell(score, 4)]
    cells.append(format_bytes(of[0].size_bytes))
    for row in of:
        cells += [mean_cell(row.accuracy), escape(difference_cell(row))]
    return cells
