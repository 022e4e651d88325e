"""Exports each kind of network in each format: the table of docs/deployment.md.

    python benchmarks/export_matrix.py --out=benchmarks/results/export_matrix.json \\
        --docs=docs/deployment.md

Exports each network of `zoo`, in float, at W8A8 and at W4A8, to every format, runs it in its own
runtime, and compares what it makes with the simulation. A cell is the largest difference, as a part
of the largest output, or why there is no file. Networks that --out has are not run again.
"""

import json
from pathlib import Path
from typing import Any

import zoo
import zoo_export
from absl import app, flags, logging

OUT = flags.DEFINE_string("out", None, "JSON file for the figures.", required=True)
DOCS = flags.DEFINE_string("docs", None, "Page whose table is to be written anew.")
ONLY = flags.DEFINE_multi_string(
    "only", [], "Run this network again; all that --out lacks if none."
)

BEGIN, END = "<!-- export matrix: begin -->", "<!-- export matrix: end -->"


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    path = Path(OUT.value)
    figures = json.loads(path.read_text()) if path.is_file() else {}
    for name, entry in zoo.ALL.items():
        if name in (ONLY.value or set(zoo.ALL) - set(figures)):
            figures[name] = {f"{w} {form}": cell for w, form, cell in zoo_export.cells(entry)}
            print(name, json.dumps(figures[name]), flush=True)
            write(path, figures)
    print(
        "\n".join(f"NO PARITY: {line}" for line in zoo_export.without_parity(figures)) or "parity"
    )
    if DOCS.value:
        page = Path(DOCS.value)
        before, rest = page.read_text().split(BEGIN)
        after = rest.split(END)[1]
        page.write_text(f"{before}{BEGIN}\n{zoo_export.markdown(figures)}\n{END}{after}")


def write(path: Path, figures: dict[str, Any]) -> None:
    """A line a network, in the order of the zoo."""
    rows = [
        f"{json.dumps(name)}: {json.dumps(figures[name])}" for name in zoo.ALL if name in figures
    ]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    app.run(main)
