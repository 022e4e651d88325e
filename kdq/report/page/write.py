"""Writes the report of workdirs: the page, the tables and the plots."""

import os
from collections.abc import Sequence
from pathlib import Path

from kdq.files import write_atomic
from kdq.report.advisor.constraints import Constraints
from kdq.report.page import build, combine, tables
from kdq.report.page.read import Folder
from kdq.report.page.section import section
from kdq.report.write import PAGE, TABLES

PLOTS = "plots"


def write(
    folders: Sequence[Folder],
    out: str | os.PathLike[str],
    constraints: Constraints | None = None,
) -> Path:
    """Writes report.html, table.md, table.csv, table.tex and plots/ to `out`.

    Args:
      folders: from `kdq.report.page.read`.
      out: made if it does not exist; each file is replaced atomically.
      constraints: of the advisor's answer.

    Returns:
      The path of the page.
    """
    out = Path(out)
    found = combine.experiments(folders)
    sections = [section(one, constraints or Constraints()) for one in found]
    made = (tables.markdown(found), tables.csv_table(found), tables.latex(found))
    for name, text in zip(TABLES, made, strict=True):
        write_atomic(out / name, text.encode())
    for i, one in enumerate(sections, 1):
        for name, data in build.files(one).items():
            prefix = f"{i}_" if len(sections) > 1 else ""
            write_atomic(out / PLOTS / f"{prefix}{name}", data)
    write_atomic(out / PAGE, build.page(sections).encode())
    return out / PAGE
