"""Writes everything that a finished experiment reports."""

import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from kdq.files import plain, write_atomic, write_json
from kdq.record import ArmRecord
from kdq.report import searches, table
from kdq.report.aggregate import Records
from kdq.report.cells import standard_output

PAGE, TABLES = "report.html", ("table.md", "table.csv", "table.tex")  # files of a report


def write_report(
    records: Records, workdir: str | os.PathLike[str], console: Console | None = None
) -> None:
    """Writes results.json and the page with its tables and plots to `workdir`; prints the table.

    And pivot.md, where methods are there at several widths, and searches.md, where searches
    compete. The last line that it prints says where the page and the tables are.

    Args:
      records: one an arm and seed.
      workdir: made if it does not exist; each file is replaced atomically.
      console: where the table is printed; None is the standard output.

    Raises:
      ValueError: see `kdq.report.table.rows`; nothing is written then.
      TypeError: a record is not JSON-serialisable.
    """
    # A program that only may have to report should not wait for the charts' library to load.
    from kdq.report import workdirs  # noqa: PLC0415
    from kdq.report.page import publish  # noqa: PLC0415

    workdir = Path(workdir)
    documents = [r.to_json() if isinstance(r, ArmRecord) else plain(r) for r in records]
    source = workdirs.workdir_of_records(documents, workdir)
    summary = table.rows(documents, scores=source.scores)
    write_json(workdir / "results.json", documents)
    if by_width := table.markdown_by_width(summary):
        write_atomic(workdir / "pivot.md", by_width.encode())
    if study := searches.markdown(documents, summary):
        write_atomic(workdir / "searches.md", study.encode())
    publish.write([source], workdir)
    console = console or standard_output()
    table.print_table(summary, console)
    print_places(workdir, console)


def print_places(folder: str | os.PathLike[str], console: Console | None = None) -> None:
    """Prints where the page and the tables of a report are, in one line.

    Args:
      folder: of the report.
      console: where; None is the standard output.
    """
    console = console or standard_output()
    page, *tables = (Path(folder, name) for name in (PAGE, *TABLES))
    text = f"Report: {page}; tables: {', '.join(map(str, tables))}"
    console.print(Text(text), soft_wrap=True)
