"""Writes the report of workdirs: the page, the tables and the plots."""

import os
from collections.abc import Sequence
from pathlib import Path

from kdq.files import write_atomic
from kdq.report.advisor.constraints import Constraints
from kdq.report.page import build, tables
from kdq.report.page.combine import combine
from kdq.report.page.section import build_section
from kdq.report.workdirs import Workdir
from kdq.report.write import PAGE, TABLES

PLOTS = "plots"


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
    sections = [build_section(each, constraints or Constraints()) for each in experiments]
    contents = (tables.markdown(experiments), tables.csv_table(experiments))
    for name, text in zip(TABLES, (*contents, tables.latex(experiments)), strict=True):
        write_atomic(out / name, text.encode())
    for i, section in enumerate(sections, 1):
        for name, data in build.draw_files(section).items():
            prefix = f"{i}_" if len(sections) > 1 else ""
            write_atomic(out / PLOTS / f"{prefix}{name}", data)
    write_atomic(out / PAGE, build.render_page(sections).encode())
    return out / PAGE
