"""The rows of the page, and the same as Markdown, CSV and LaTeX."""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence

from kdq.report import table
from kdq.report.aggregate import Row
from kdq.report.cells import (
    ABSENT,
    escape,
    format_bytes,
    format_energy,
    mean_cell,
)
from kdq.report.notes import quick_note
from kdq.report.page.combine import Experiment
from kdq.report.page.times import latencies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What is shown, and what it is sorted by."""

    text: str
    sort: str | float | None  # None: nothing was measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A table whose first column names its rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    arms: tuple[str, ...]  # of the rows
    states: tuple[str, ...]  # of the rows: "failed" where no seed finished


Column = tuple[str, Callable[[Row], str], Callable[[Row], str | float | None]]


def number(value: float) -> float | None:
    """None where nothing was measured."""
    return None if math.isnan(value) else value


COLUMNS: tuple[Column, ...] = (
    ("Arm", lambda r: r.arm, lambda r: r.arm),
    ("Kind", lambda r: r.kind or ABSENT, lambda r: r.kind),
    ("Bits", lambda r: r.bits or ABSENT, lambda r: r.bits),
    ("Accuracy %", table.accuracy_cell, lambda r: number(r.accuracy.mean)),
    (
        "Δ [95%]",
        table.difference_cell,
        lambda r: None if r.difference is None else number(r.difference.mean),
    ),
    ("Δ against", lambda r: r.reference or ABSENT, lambda r: r.reference or ""),
    (
        "Size (smaller)",
        lambda r: f"{format_bytes(r.size_bytes)}{_times(r.size_ratio)}",
        lambda r: number(r.size_bytes),
    ),
    (
        "Energy, modelled",
        lambda r: format_energy(r.energy_modelled_nj),
        lambda r: number(r.energy_modelled_nj),
    ),
    ("Train s", lambda r: _plain(r.train_seconds), lambda r: number(r.train_seconds)),
    ("Compile s", lambda r: _plain(r.compile_seconds), lambda r: number(r.compile_seconds)),
    ("Seeds", lambda r: str(len(r.seeds)), lambda r: len(r.seeds)),
)
FIDELITY: tuple[Column, ...] = (
    COLUMNS[0],
    ("Accuracy %", lambda r: mean_cell(r.accuracy), lambda r: number(r.accuracy.mean)),
    ("Agreement %", lambda r: mean_cell(r.agreement), lambda r: number(r.agreement.mean)),
    ("KL, nats", lambda r: mean_cell(r.kl_to_teacher, 4), lambda r: number(r.kl_to_teacher.mean)),
    *(
        (name, cell, lambda r, key=key: number(r.measures[key].mean))
        for name, key, cell in table.TRANSFER
    ),
)


def _times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f" ({ratio:.1f}×)"


def _plain(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:.1f}"


def results(experiment: Experiment) -> Grid:
    """The main table, with a column for each device and batch size that was timed.

    Columns that nobody measured are left out, and seeds where all finished arms have as many.
    """
    same = len({len(row.seeds) for row in experiment.rows if row.seeds}) == 1
    columns = [c for c in _measured(COLUMNS, experiment.rows) if c[0] != "Seeds" or not same]
    times = latencies(experiment.records)
    devices = {device for device, _ in times}
    for (device, batch), own in times.items():
        name = f"Batch {batch}, ms" + (f" ({device})" if len(devices) > 1 else "")
        columns.append(
            (
                name,
                lambda r, own=own: (
                    f"{mean_cell(own[r.arm][0], 3)} {own[r.arm][1]}" if r.arm in own else ABSENT
                ),
                lambda r, own=own: own[r.arm][0].mean if r.arm in own else None,
            )
        )
    return _grid(columns, experiment.rows)


def fidelity(experiment: Experiment) -> Grid:
    """What was taken over from the teacher; columns that nobody measured are left out."""
    measured = [row for row in experiment.rows if row.seeds]
    return _grid(_measured(FIDELITY, measured), measured)


def _measured(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    says_something = lambda text, sort, row: sort(row) is not None or text(row) != ABSENT
    return [
        (name, text, sort)
        for name, text, sort in columns
        if any(says_something(text, sort, row) for row in rows)
    ]


def _grid(columns: Sequence[Column], rows: Sequence[Row]) -> Grid:
    texts = table.cells_of([(name, text) for name, text, _ in columns], rows)
    sorts = {name: [sort(row) for row in rows] for name, _, sort in columns}
    cells = {
        name: [Cell(text=text, sort=sort) for text, sort in zip(own, sorts[name], strict=True)]
        for name, own in texts.items()
    }
    return Grid(
        head=tuple(cells),
        rows=tuple(zip(*cells.values(), strict=True)),
        arms=tuple(row.arm for row in rows),
        states=tuple("" if row.seeds else "failed" for row in rows),
    )


def markdown(experiments: Sequence[Experiment]) -> str:
    """`kdq.report.table.markdown` of each experiment, and what was left out."""
    parts = []
    for one in experiments:
        head = [f"## {escape(one.name)}", ""] if len(experiments) > 1 else []
        parts.append("\n".join([*head, table.markdown(one.rows, one.records)]))
        if one.problems:
            left_out = [f"- {escape(problem)}" for problem in one.problems]
            parts.append("\n".join(["Left out or kept apart:", "", *left_out, ""]))
    return "\n".join(parts)


def csv_table(experiments: Sequence[Experiment]) -> str:
    """A line an arm, with plain numbers; an empty field was not measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    named: dict[str, Callable[[Row], object]] = {
        "arm": lambda r: r.arm,
        "kind": lambda r: r.kind,
        "bits": lambda r: r.bits,
        "seeds": lambda r: " ".join(map(str, r.seeds)),
        "failed_seeds": lambda r: " ".join(str(seed) for seed, _ in r.failures),
        "params": lambda r: r.params,
        "size_bytes": lambda r: r.size_bytes,
        "accuracy_percent": lambda r: r.accuracy.mean,
        "accuracy_std": lambda r: r.accuracy.std,
        "reference": lambda r: r.reference or "",
        "difference": lambda r: r.difference.mean if r.difference else math.nan,
        "difference_low": lambda r: r.difference.low if r.difference else math.nan,
        "difference_high": lambda r: r.difference.high if r.difference else math.nan,
        "agreement_percent": lambda r: r.agreement.mean,
        "kl_to_teacher_nats": lambda r: r.kl_to_teacher.mean,
        "ece_percent": lambda r: r.measures["ece"].mean,
        "bops": lambda r: r.bops,
        "energy_modelled_nj": lambda r: r.energy_modelled_nj,
        "train_seconds": lambda r: r.train_seconds,
        "compile_seconds": lambda r: r.compile_seconds,
        "quick": lambda r: "yes" if r.quick else "",
    }
    times = {one.name: latencies(one.records) for one in experiments}
    conditions = sorted({condition for own in times.values() for condition in own})
    timed = [f"milliseconds of batch {batch} on {device}" for device, batch in conditions]
    writer.writerow(["experiment", *named, *timed])
    for one in experiments:
        for row in one.rows:
            own = [times[one.name].get(c, {}).get(row.arm) for c in conditions]
            found = [get(row) for get in named.values()]
            found += [math.nan if entry is None else entry[0].mean for entry in own]
            writer.writerow([_field(value) for value in (one.name, *found)])
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
    """A booktabs table an experiment, for \\usepackage{booktabs}."""
    names = ("Arm", "Bits", "Size (smaller)", "Accuracy %", "Δ [95%]", "Δ against")
    shown = [column for column in COLUMNS if column[0] in names]
    shown.sort(key=lambda column: names.index(column[0]))
    blocks = ["% \\usepackage{booktabs}"]
    for one in experiments:
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(one.name)}: test accuracy, mean $\pm$ standard deviation over "
            r"seeds; $\Delta$ in points, paired by seed, with its 95\% interval; * excludes 0."
            rf"{_latex(' ' + quick_note(one.rows)).rstrip()}}}",
            rf"\begin{{tabular}}{{{''.join('l' if n in _LEFT else 'r' for n in names)}}}",
            r"\toprule",
            " & ".join(_latex(name) for name in names) + r" \\",
            r"\midrule",
        ]
        for row in one.rows:
            cells = [
                "failed" if name == "Accuracy %" and not row.seeds else text(row)
                for name, text, _ in shown
            ]
            lines.append(" & ".join(map(_latex, cells)) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


_LEFT = ("Arm", "Bits", "Δ against")


def _latex(text: str) -> str:
    escaped = "".join(LATEX.get(char, char) for char in text)
    # After a row's end a bracket would be taken for an argument.
    return re.sub(r"^\[", "{[}", escaped)
