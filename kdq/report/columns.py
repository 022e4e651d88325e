"""Columns of tables of arms: what each shows of a row, and what it is sorted by."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from kdq.report import metric as metrics
from kdq.report.aggregate import Mean, Row, has_one_seed
from kdq.report.cells import (
    ABSENT,
    difference_cell,
    format_bops,
    format_bytes,
    format_energy,
    mean_cell,
    number_cell,
    over_seeds_cell,
    p_value_cell,
    score_cell,
    without_count,
)
from kdq.report.metric import TRANSFER
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.tasks import Task


@dataclasses.dataclass(frozen=True)
class Column:
    """One column; what it is sorted by is None where nothing was measured."""

    name: str
    text: Callable[[Row], str]
    sort: Callable[[Row], str | float | None]


def main_columns(task: "Task") -> dict[str, Column]:
    """Returns the columns of every experiment, in their order in Markdown.

    Keys are the same for every task; other metrics and those of fidelity have their own names.
    """
    metric = task.primary
    return {
        "arm": _text("Arm", lambda r: r.arm),
        "kind": _text("Kind", lambda r: r.kind),
        "bits": _text("Bits", lambda r: r.bits),
        "params": _number("Params", lambda r: r.mean("params"), lambda v: number_cell(v, ",.0f")),
        "size": _number("Size", lambda r: r.size_bytes, format_bytes),
        "smaller": _number("Smaller", lambda r: r.size_ratio, _times),
        "size_smaller": Column(
            "Size (smaller)",
            lambda r: f"{format_bytes(r.size_bytes)}{_in_brackets(r.size_ratio)}",
            lambda r: _sortable(r.size_bytes),
        ),
        "score": Column(metrics.title(metric), score_cell, lambda r: _sortable(r.score.mean)),
        "difference": Column(
            "Δ [95%]",
            difference_cell,
            lambda r: None if r.difference is None else _sortable(r.difference.mean),
        ),
        "reference": _text("Δ against", lambda r: r.reference),
        "over_seeds": Column("Over seeds alone", over_seeds_cell, lambda r: None),
        "p_holm": Column("p, Holm", p_value_cell, lambda r: _sortable(r.p_holm)),
        "selected_on": _text("Selected on", lambda r: r.selected_on),
        "last": _mean(f"Last step {metric.unit}".rstrip(), lambda r: r.score_last, metric.decimals),
        **{m.name: metric_column(m) for m in metrics.other_metrics(task)},
        **{m.name: metric_column(m) for m in metrics.fidelity_metrics(task)},
        "bops": _number("BOPs", lambda r: r.mean("bops"), format_bops),
        "energy": _number("Energy, modelled", lambda r: r.energy_modelled_nj, format_energy),
        "train": _number("Train s", lambda r: r.train_seconds, lambda v: number_cell(v, ".1f")),
        "compile": _number(
            "Compile s", lambda r: r.compile_seconds, lambda v: number_cell(v, ".1f")
        ),
        "seeds": Column("Seeds", lambda r: str(len(r.seeds)), lambda r: len(r.seeds)),
    }


def transfer_columns() -> list[Column]:
    """Returns the columns of `kdq.report.metric.TRANSFER`."""
    return [metric_column(metric, heading) for metric, heading in TRANSFER.values()]


def fidelity_columns(task: "Task") -> list[Column]:
    """Returns the columns of what was taken over from the teacher."""
    units = {"kl_to_teacher": "KL, nats"}
    return [
        main_columns(task)["arm"],
        metric_column(task.primary),
        *(metric_column(m, units.get(m.name)) for m in metrics.fidelity_metrics(task)),
        *transfer_columns(),
    ]


def metric_column(metric: Metric, heading: str | None = None) -> Column:
    """Returns the column of a metric's mean on test."""
    heading = heading or metrics.title(metric)
    return _mean(heading, lambda r: r.mean_of(metric), metric.decimals)


def cells_of(columns: Iterable[Column], table: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the cells of each column; that all arms have one seed is for the notes to say."""
    plain = without_count if has_one_seed(table) else lambda text: text
    return {column.name: [plain(column.text(row)) for row in table] for column in columns}


def _text(name: str, get: Callable[[Row], str]) -> Column:
    return Column(name, lambda r: get(r) or ABSENT, get)


def _number(name: str, get: Callable[[Row], float], show: Callable[[float], str]) -> Column:
    return Column(name, lambda r: show(get(r)), lambda r: _sortable(get(r)))


def _mean(name: str, get: Callable[[Row], Mean], digits: int = 2) -> Column:
    return Column(name, lambda r: mean_cell(get(r), digits), lambda r: _sortable(get(r).mean))


def _sortable(value: float) -> float | None:
    return None if math.isnan(value) else value


def _times(ratio: float) -> str:
    return ABSENT if math.isnan(ratio) else f"{ratio:.1f}×"


def _in_brackets(ratio: float) -> str:
    return "" if math.isnan(ratio) else f" ({ratio:.1f}×)"
