"""The rows of the page, and the same as Markdown, CSV and LaTeX."""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdq.report import metric as metrics
from kdq.report import table
from kdq.report.aggregate import Row, latencies
from kdq.report.cells import (
    ABSENT,
    escape,
    format_bytes,
    format_energy,
    mean_cell,
    number_cell,
)
from kdq.report.columns import Column, cells_of, fidelity_columns, main_columns
from kdq.report.metric import (
    TRANSFER,
    distance_metric,
    fidelity_metrics,
    in_unit,
    other_metrics,
)
from kdq.report.notes import coverage, quick_note
from kdq.report.page.combine import Experiment
from kdq.report.page.views import width_name
from kdq.tasks.metric import Metric

if TYPE_CHECKING:
    from kdq.tasks import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A text that is shown, and what it is sorted by."""

    text: str
    sort: str | float | None  # None: nothing was measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A table whose first column names its rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    arms: tuple[str, ...]  # of the rows
    states: tuple[str, ...]  # of the rows: "failed" where no seed finished


SHOWN = ("arm", "kind", "bits", "score", "difference", "reference", "over_seeds", "p_holm")
COSTS = ("size_smaller", "energy", "train", "compile", "seeds")


def results_grid(experiment: Experiment) -> Grid:
    """Returns the main table, with a column for each device and batch size that was timed.

    Columns that nobody measured are left out, and seeds where all finished arms have as many.
    """
    rows = experiment.rows
    same = len({len(row.seeds) for row in rows if row.seeds}) == 1
    columns = main_columns(experiment.task)
    others = [metric.name for metric in other_metrics(experiment.task)]
    keys = [key for key in (*SHOWN, *others, *COSTS) if key != "seeds" or not same]
    shown = _measured([columns[key] for key in keys], rows)
    times = latencies(experiment.records)
    devices = {device for device, _ in times}
    for (device, batch), arms in times.items():
        where = f" ({device})" if len(devices) > 1 else ""
        shown.append(
            Column(
                f"Batch {batch}, ms{where}",
                lambda r, arms=arms: (
                    f"{mean_cell(arms[r.arm][0], 3)} {arms[r.arm][1]}" if r.arm in arms else ABSENT
                ),
                lambda r, arms=arms: arms[r.arm][0].mean if r.arm in arms else None,
            )
        )
    return _grid(shown, rows)


def fidelity_grid(experiment: Experiment) -> Grid:
    """Returns what was taken over from the teacher; columns that nobody measured are left out."""
    rows = [row for row in experiment.rows if row.seeds]
    return _grid(_measured(fidelity_columns(experiment.task), rows), rows)


def _measured(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    return [
        column
        for column in columns
        if any(column.sort(row) is not None or column.text(row) != ABSENT for row in rows)
    ]


def _grid(columns: Sequence[Column], rows: Sequence[Row]) -> Grid:
    texts = zip(*cells_of(columns, rows).values(), strict=True)
    return Grid(
        head=tuple(column.name for column in columns),
        rows=tuple(
            tuple(
                Cell(text=text, sort=column.sort(row))
                for text, column in zip(line, columns, strict=True)
            )
            for line, row in zip(texts, rows, strict=True)
        ),
        arms=tuple(row.arm for row in rows),
        states=tuple("" if row.seeds else "failed" for row in rows),
    )


def layer_grid(layers: Sequence[Mapping[str, Any]], task: "Task") -> Grid:
    """Returns what the policy of an arm is, does and costs; `layers` are those of its details."""
    sensitivity = f"Sensitivity{in_unit(distance_metric(task))}"
    head = ("Layer", "Kind", "Bits", sensitivity, "SQNR of weights, dB", "Input range")
    head += ("Weights", "Size", "MACs", "BOPs", "Energy, modelled")
    plain = lambda value, form: number_cell(math.nan if value is None else value, form)
    lines = []
    for layer in layers:
        ends = layer["range"]
        known = ends and None not in ends
        lines.append(
            (
                (layer["path"] or "(root)", layer["path"]),
                (layer["kind"], layer["kind"]),
                (width_name(layer), width_name(layer)),
                (plain(layer["sensitivity"], ".2e"), layer["sensitivity"]),
                (plain(layer["sqnr_db"], ".1f"), layer["sqnr_db"]),
                (f"{ends[0]:.3g} to {ends[1]:.3g}", ends[1] - ends[0]) if known else (ABSENT, None),
                (f"{layer['weights']:,}", layer["weights"]),
                (format_bytes(layer["bytes"]), layer["bytes"]),
                (f"{layer['macs']:,}", layer["macs"]),
                (f"{layer['bops']:,}", layer["bops"]),
                (format_energy(layer["energy_modelled_nj"]), layer["energy_modelled_nj"]),
            )
        )
    return Grid(
        head=head,
        rows=tuple(tuple(Cell(text=t, sort=s) for t, s in line) for line in lines),
        arms=tuple(layer["path"] for layer in layers),
        states=("",) * len(layers),
    )


def markdown(experiments: Sequence[Experiment]) -> str:
    """Returns `kdq.report.table.markdown` of each experiment, and what was left out."""
    parts = []
    for each in experiments:
        head = [f"## {escape(each.name)}", ""] if len(experiments) > 1 else []
        parts.append("\n".join([*head, table.markdown(each.rows, each.records)]))
        if each.problems:
            left_out = [f"- {escape(problem)}" for problem in each.problems]
            parts.append("\n".join(["Left out or kept apart:", "", *left_out, ""]))
    return "\n".join(parts)


def _csv_name(metric: Metric) -> str:
    return metric.name + {"%": "_percent", "": ""}.get(metric.unit, f"_{metric.unit}")


def _csv_columns(task: "Task") -> dict[str, Callable[[Row], object]]:
    metric = task.primary
    end = lambda of, name: getattr(of, name) if of else math.nan
    means = (*other_metrics(task), *fidelity_metrics(task))
    return {
        "arm": lambda r: r.arm,
        "kind": lambda r: r.kind,
        "bits": lambda r: r.bits,
        "seeds": lambda r: " ".join(map(str, r.seeds)),
        "failed_seeds": lambda r: " ".join(str(seed) for seed, _ in r.failures),
        "params": lambda r: r.mean("params"),
        "size_bytes": lambda r: r.size_bytes,
        _csv_name(metric): lambda r: r.score.mean,
        f"{metric.name}_std": lambda r: r.score.std,
        "reference": lambda r: r.reference,
        "difference": lambda r: end(r.difference, "mean"),
        "difference_low": lambda r: end(r.difference, "low"),
        "difference_high": lambda r: end(r.difference, "high"),
        "difference_over": lambda r: r.difference.over if r.difference else "",
        "difference_over_seeds_low": lambda r: end(r.difference_over_seeds, "low"),
        "difference_over_seeds_high": lambda r: end(r.difference_over_seeds, "high"),
        "p_value": lambda r: end(r.difference, "p_value"),
        "p_value_holm": lambda r: r.p_holm,
        **{_csv_name(m): lambda r, m=m: r.mean_of(m).mean for m in means},
        "ece_percent": lambda r: r.mean_of(TRANSFER["ece"][0]).mean,
        "bops": lambda r: r.mean("bops"),
        "energy_modelled_nj": lambda r: r.energy_modelled_nj,
        "train_seconds": lambda r: r.train_seconds,
        "compile_seconds": lambda r: r.compile_seconds,
        "quick": lambda r: "yes" if r.quick else "",
    }


def csv_table(experiments: Sequence[Experiment]) -> str:
    """Returns a line an arm, with plain numbers; an empty field was not measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    times = {each.name: latencies(each.records) for each in experiments}
    conditions = sorted({condition for timed in times.values() for condition in timed})
    columns = [_csv_columns(each.task) for each in experiments]
    names = dict.fromkeys(name for of_metric in columns for name in of_metric)
    timed = [f"milliseconds of batch {batch} on {device}" for device, batch in conditions]
    writer.writerow(["experiment", *names, *timed])
    for each, get in zip(experiments, columns, strict=True):
        for row in each.rows:
            values = [get[name](row) if name in get else math.nan for name in names]
            entries = [times[each.name].get(c, {}).get(row.arm) for c in conditions]
            values += [math.nan if entry is None else entry[0].mean for entry in entries]
            writer.writerow([_field(value) for value in (each.name, *values)])
    return out.getvalue()


def _field(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.10g}"
    return _harmless(value) if isinstance(value, str) else value


# What a spreadsheet takes for the beginning of a formula, in full width too; it skips blanks.
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def _harmless(text: str) -> str:
    """Returns a text that no spreadsheet computes: with an apostrophe before what might be a
    formula. Numbers stay as they are."""
    # A bare return ends a row, and csv does not quote it.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        float(text)
    except ValueError:
        begins = text.lstrip().startswith(FORMULA) or text.startswith(("\t", "\n"))
        return f"'{text}" if begins else text
    return text


LATEX = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"±": r"$\pm$", "Δ": r"$\Delta$", "×": r"$\times$", "—": "---", "µ": r"\textmu{}"},
    **{"−": "$-$", "<": r"\textless{}", ">": r"\textgreater{}", "\n": " "},
}


def latex(experiments: Sequence[Experiment]) -> str:
    """Returns a booktabs table an experiment, for \\usepackage{booktabs}."""
    blocks = ["% \\usepackage{booktabs}"]
    for each in experiments:
        metric, every = each.metric, main_columns(each.task)
        columns = [every[key] for key in IN_LATEX]
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(each.name)}: test {metrics.named(metric)}, mean $\pm$ standard "
            rf"deviation over seeds; $\Delta$ in {_latex(metric.difference_unit)}, paired by seed, "
            rf"with its 95\% interval {coverage(each.rows)}; * excludes 0."
            rf"{_latex(' ' + quick_note(each.rows)).rstrip()}}}",
            rf"\begin{{tabular}}{{{''.join('l' if key in LEFT else 'r' for key in IN_LATEX)}}}",
            r"\toprule",
            " & ".join(_latex(column.name) for column in columns) + r" \\",
            r"\midrule",
        ]
        for row in each.rows:
            cells = [
                "failed" if column is every["score"] and not row.seeds else column.text(row)
                for column in columns
            ]
            lines.append(" & ".join(map(_latex, cells)) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


IN_LATEX = ("arm", "bits", "size_smaller", "score", "difference", "reference")
LEFT = ("arm", "bits", "reference")


def _latex(text: str) -> str:
    escaped = "".join(LATEX.get(char, char) for char in text)
    # After a row's end a bracket would be taken for an argument.
    return re.sub(r"^\[", "{[}", escaped)
