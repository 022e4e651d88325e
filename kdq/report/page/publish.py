"""Writes the report of workdirs: the page, the tables and the plots.

The page is data and charts in one template, which shows text as text and loads nothing.
"""

import base64
import gzip
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from kdq.files import plain, write_atomic
from kdq.report.advisor.constraints import Constraints
from kdq.report.notes import environment, texts
from kdq.report.page import draw, tables
from kdq.report.page.combine import combine
from kdq.report.page.section import ABOUT, Section
from kdq.report.workdirs import Workdir
from kdq.report.write import PAGE, TABLES

PLOTS = "plots"
RECORDS_BYTES = 1_200_000  # of compressed records on the page
LARGE = ("cka", "ptq_errors", "exports")  # of a record, left out of the page where all are too many


def write(
    workdirs: Sequence[Workdir],
    out: str | os.PathLike[str],
    constraints: Constraints | None = None,
) -> Path:
    """Writes report.html, table.md, table.csv, table.tex and plots/ to `out`.

    Args:
      workdirs: from `kdq.report.workdirs.read_workdirs`.
      out: made if it does not exist; each file is replaced atomically.
      constraints: of the advisor's answer.

    Returns:
      The path of the page.
    """
    out, experiments = Path(out), combine(workdirs)
    sections = [Section(each, constraints or Constraints()) for each in experiments]
    contents = (tables.markdown(experiments), tables.csv_table(experiments))
    for name, text in zip(TABLES, (*contents, tables.latex(experiments)), strict=True):
        write_atomic(out / name, text.encode())
    for i, section in enumerate(sections, 1):
        prefix = f"{i}_" if len(sections) > 1 else ""
        warning = texts().quick(section.experiment.rows).rstrip(".")
        for chart in (chart for charts in section.charts.values() for chart in charts):
            title = chart.title + (f" ({warning})" if warning else "")
            png, svg = draw.pictures(chart.specs, title)
            write_atomic(out / PLOTS / f"{prefix}{chart.name}.png", png)
            write_atomic(out / PLOTS / f"{prefix}{chart.name}.svg", svg)
    write_atomic(out / PAGE, _render_page(sections).encode())
    return out / PAGE


def _render_page(sections: Sequence[Section]) -> str:
    """Returns the HTML of all experiments."""
    templates = environment(autoescape=True)
    templates.filters |= {"breakable": _breakable, "in_parts": _in_parts}
    read = lambda name: templates.loader.get_source(templates, name)[0]
    scripts = [draw.program(), read("report.js")]
    specs = {
        # One scale stands above all maps of confusions.
        f"chart-{i}-{part}-{j}-{k}": draw.on_page(spec, legend=part != "confusions")
        for i, section in enumerate(sections)
        for part, charts in section.charts.items()
        for j, chart in enumerate(charts)
        for k, spec in enumerate(chart.specs)
    }
    # JSON that can't end the script element that it stands in.
    charts = json.dumps(plain(specs), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        charts = charts.replace(char, f"\\u{ord(char):04x}")
    # No network, no script but these, no form.
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    hashes = " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    records, left_out = _pack_records(sections)
    return templates.get_template("report.html").render(
        sections=sections,
        about=ABOUT,
        tables=tables,
        notes=texts(),
        style=Markup(read("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=policy,
        charts=Markup(charts),
        records=records,
        left_out=left_out,
    )


def _breakable(text: Any) -> Markup:
    """Returns a text whose names may go on in the next line after an underscore or a slash."""
    return Markup(re.sub("([_/])", r"\1<wbr>", str(escape(text))))


def _in_parts(text: str) -> Markup:
    """Returns numbers that may go on in the next line before a bracket or a format's name."""
    parts = re.split(r" (?=[(\[]|[a-z]{4})", text)
    return Markup(" ").join(Markup("<span>{}</span>").format(part) for part in parts)


def _pack_records(sections: Sequence[Section]) -> tuple[str, tuple[str, ...]]:
    """Returns records of all arms, compressed, and the fields that there was no room for."""
    every = [[r.to_json() for r in section.experiment.records] for section in sections]
    for left_out in ((), LARGE):
        kept = [[{k: v for k, v in r.items() if k not in left_out} for r in each] for each in every]
        packed = base64.b64encode(gzip.compress(json.dumps(kept).encode(), mtime=0))
        if len(packed) <= RECORDS_BYTES:
            return packed.decode(), left_out
    return "", ("all of it",)
