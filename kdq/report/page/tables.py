"""The rows of the page, and the same as Markdown, CSV and LaTeX."""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kdq.report import metric as metrics
from kdq.report import table
from kdq.report.aggregate import Row, latencies
from kdq.report.cells import (
    ABSENT,
    Column,
    cells_of,
    escape,
    format_bytes,
    format_energy,
    main_columns,
    mean_cell,
    metric_column,
    number_cell,
    number_column,
    text_column,
    transfer_columns,
)
from kdq.report.notes import coverage, texts
from kdq.report.page.combine import Experiment
from kdq.report.page.views import width_name

if TYPE_CHECKING:
    from kdq.tasks import Task


class Cell(NamedTuple):
    """A text that is shown, and what it is sorted by."""

    text: str
    sort: str | float | None  # None: nothing was measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A table whose first column names its rows."""

    head: tuple[str, ...]
    rows: list[list[Cell]]
    arms: list[str]  # of the rows
    states: list[str]  # of the rows: "failed" where no seed finished


SHOWN = ("arm", "kind", "bits", "score", "difference", "reference", "over_seeds", "p_holm")
COSTS = ("size_smaller", "energy", "train", "compile", "seeds")
IN_LATEX = ("arm", "bits", "size_smaller", "score", "difference", "reference")


def results_grid(experiment: Experiment) -> Grid:
    """Returns the main table, with a column for each device and batch size that was timed.

    Columns that nobody measured are left out, and seeds where all finished arms have as many.
    """
    rows, task = experiment.rows, experiment.task
    same = len({len(row.seeds) for row in rows if row.seeds}) == 1
    others = [metric.name for metric in metrics.other_metrics(task)]
    keys = [key for key in (*SHOWN, *others, *COSTS) if key != "seeds" or not same]
    columns = [main_columns(task)[key] for key in keys]
    times = latencies(experiment.records)
    devices = {device for device, _ in times}
    for (device, batch), arms in times.items():
        where = f" ({device})" if len(devices) > 1 else ""
        cells = {arm: Cell(f"{mean_cell(t, 3)} {form}", t.mean) for arm, (t, form) in arms.items()}
        cell = lambda row, cells=cells: cells.get(row.arm, Cell(ABSENT, None))
        columns.append(
            Column(
                f"Batch {batch}, ms{where}",
                lambda row, cell=cell: cell(row).text,
                lambda row, cell=cell: cell(row).sort,
            )
        )
    return _grid(columns, rows)


def fidelity_grid(experiment: Experiment) -> Grid:
    """Returns what was taken over from the teacher; columns that nobody measured are left out."""
    task, headings = experiment.task, {"kl_to_teacher": "KL, nats"}
    fidelity = [metric_column(m, headings.get(m.name)) for m in metrics.fidelity_metrics(task)]
    columns = [main_columns(task)["arm"], metric_column(task.primary), *fidelity]
    return _grid([*columns, *transfer_columns()], [row for row in experiment.rows if row.seeds])


def _grid(columns: Sequence[Column], rows: Sequence[Row]) -> Grid:
    has = lambda column, row: column.sort(row) is not None or column.text(row) != ABSENT
    columns = [column for column in columns if any(has(column, row) for row in rows)]
    texts = zip(*cells_of(columns, rows).values(), strict=True)
    return Grid(
        head=tuple(column.name for column in columns),
        rows=[
            [Cell(text, column.sort(row)) for text, column in zip(line, columns, strict=True)]
            for line, row in zip(texts, rows, strict=True)
        ],
        arms=[row.arm for row in rows],
        states=["" if row.seeds else "failed" for row in rows],
    )


def layer_grid(layers: Sequence[Mapping[str, Any]], task: "Task") -> Grid:
    """Returns what the policy of an arm is, does and costs; `layers` are those of its details."""
    get = lambda key: lambda layer: layer[key]
    form = lambda spec: lambda value: number_cell(value, spec)
    known = lambda ends: ends and None not in ends
    span = lambda ends: f"{ends[0]:.3g} to {ends[1]:.3g}" if known(ends) else ABSENT
    sensitivity = f"Sensitivity{metrics.in_unit(metrics.distance_metric(task))}"
    columns = (
        Column("Layer", lambda layer: layer["path"] or "(root)", get("path")),
        text_column("Kind", get("kind")),
        text_column("Bits", width_name),
        number_column(sensitivity, get("sensitivity"), form(".2e")),
        number_column("SQNR of weights, dB", get("sqnr_db"), form(".1f")),
        Column(
            "Input range",
            lambda layer: span(layer["range"]),
            lambda layer: layer["range"][1] - layer["range"][0] if known(layer["range"]) else None,
        ),
        number_column("Weights", get("weights"), form(",")),
        number_column("Size", get("bytes"), format_bytes),
        number_column("MACs", get("macs"), form(",")),
        number_column("BOPs", get("bops"), form(",")),
        number_column("Energy, modelled", get("energy_modelled_nj"), format_energy),
    )
    return Grid(
        head=tuple(column.name for column in columns),
        rows=[[Cell(c.text(layer), c.sort(layer)) for c in columns] for layer in layers],
        arms=[layer["path"] for layer in layers],
        states=[""] * len(layers),
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


def _csv_columns(task: "Task") -> dict[str, Callable[[Row], object]]:
    metric = task.primary
    titled = lambda m: m.name + {"%": "_percent", "": ""}.get(m.unit, f"_{m.unit}")
    end = lambda of, name: getattr(of, name) if of else math.nan
    means = (*metrics.other_metrics(task), *metrics.fidelity_metrics(task))
    return {
        "arm": lambda r: r.arm,
        "kind": lambda r: r.kind,
        "bits": lambda r: r.bits,
        "seeds": lambda r: " ".join(map(str, r.seeds)),
        "failed_seeds": lambda r: " ".join(str(seed) for seed, _ in r.failures),
        "params": lambda r: r.mean("params"),
        "size_bytes": lambda r: r.size_bytes,
        titled(metric): lambda r: r.score.mean,
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
        **{titled(m): lambda r, m=m: r.mean_of(m).mean for m in means},
        "ece_percent": lambda r: r.mean_of(metrics.TRANSFER["ece"][0]).mean,
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


# What a spreadsheet takes for the beginning of a formula, in full width too; it skips blanks.
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def _field(value: object) -> object:
    """Returns a field of which no spreadsheet computes anything.

    There is an apostrophe before a text that might be a formula; numbers stay as they are.
    """
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.10g}"
    if not isinstance(value, str):
        return value
    # A bare return ends a row, and csv does not quote it.
    text = value.replace("\r\n", "\n").replace("\r", "\n")
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
            rf"{_latex(' ' + texts().quick(each.rows)).rstrip()}}}",
            r"\begin{tabular}{llrrrl}",
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


def _latex(text: str) -> str:
    escaped = "".join(LATEX.get(char, char) for char in text)
    # After a row's end a bracket would be taken for an argument.
    return re.sub(r"^\[", "{[}", escaped)
