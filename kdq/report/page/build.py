"""The page: data and charts in one template, which shows text as text and loads nothing."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from kdq.files import plain
from kdq.report.page import draw
from kdq.report.page.methods import ABOUT
from kdq.report.page.section import Section

RECORDS_BYTES = 1_200_000  # of compressed records on the page
LARGE = ("cka", "ptq_errors", "exports")  # of a record, left out of the page where all are too many


def render_page(sections: Sequence[Section]) -> str:
    """Returns the HTML of all experiments."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdq.report.page", "template"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": breakable, "in_parts": in_parts}
    read = lambda name: environment.loader.get_source(environment, name)[0]
    scripts = [draw.program(), read("report.js")]
    specs = {
        # One scale stands above all maps of confusions.
        f"chart-{i}-{part}-{j}-{k}": draw.on_page(spec, legend=part != "confusions")
        for i, section in enumerate(sections)
        for part, charts in section.charts.items()
        for j, chart in enumerate(charts)
        for k, spec in enumerate(chart.specs)
    }
    records, left_out = _pack_records(sections)
    return environment.get_template("report.html").render(
        sections=sections,
        about=ABOUT,
        style=Markup(read("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
        charts=_embed_json(specs),
        records=records,
        left_out=left_out,
    )


def breakable(text: Any) -> Markup:
    """Returns a text whose names may go on in the next line after an underscore or a slash."""
    escaped = str(escape(text))
    return Markup(re.sub("([_/])", r"\1<wbr>", escaped))


def in_parts(text: str) -> Markup:
    """Returns numbers that may go on in the next line before a bracket or a format's name."""
    parts = re.split(r" (?=[(\[]|[a-z]{4})", text)
    return Markup(" ").join(Markup("<span>{}</span>").format(part) for part in parts)


def _policy(scripts: Sequence[str]) -> str:
    """Allows no network, no script but these, no form."""
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    hashes = " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _embed_json(value: Any) -> Markup:
    """Returns JSON that can't end the script element that it stands in."""
    text = json.dumps(plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _pack_records(sections: Sequence[Section]) -> tuple[str, tuple[str, ...]]:
    """Returns records of all arms, compressed, and the fields that there was no room for."""
    every = [[r.to_json() for r in section.experiment.records] for section in sections]
    for left_out in ((), LARGE):
        kept = [[{k: v for k, v in r.items() if k not in left_out} for r in each] for each in every]
        packed = base64.b64encode(gzip.compress(json.dumps(kept).encode(), mtime=0))
        if len(packed) <= RECORDS_BYTES:
            return packed.decode(), left_out
    return "", ("all of it",)


def draw_files(section: Section) -> dict[str, bytes]:
    """Returns every chart of an experiment as PNG and SVG, by name."""
    files: dict[str, bytes] = {}
    warning = section.notes["quick"].rstrip(".")
    quick = f" ({warning})" if warning else ""
    for chart in (chart for charts in section.charts.values() for chart in charts):
        png, svg = draw.pictures(chart.specs, chart.title + quick)
        files |= {f"{chart.name}.png": png, f"{chart.name}.svg": svg}
    return files
