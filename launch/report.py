"""Writes one page of the results of one or several workdirs, with its tables and plots.

    python launch/report.py --workdirs=runs/digits --out=report

Leaves report.html (which opens from disk and loads nothing), table.md, table.csv, table.tex and
plots/ as PNG and SVG. Seeds of the same arms are put together; what must not be compared, as of
other data, is kept apart.
"""

from absl import flags

from kdq import cli

WORKDIRS = cli.define_paths("workdirs", None, "Folders of launch/compress.py or launch/train.py.")
OUT = cli.define_path("out", None, "Folder for the report; made if it does not exist.")
MAX_SIZE = flags.DEFINE_float("max_size_kib", None, "For the answer: largest file on disk, KiB.")
MAX_DROP = flags.DEFINE_float(
    "max_drop", None, "For the answer: most points of validation accuracy below the teacher's."
)


def main(_: list[str]) -> None:
    from kdq.report.advisor.constraints import Constraints
    from kdq.report.page import publish
    from kdq.report.workdirs import read_workdirs
    from kdq.report.write import print_places

    constraints = Constraints(max_size_kib=MAX_SIZE.value, max_drop=MAX_DROP.value)
    publish.write(read_workdirs(WORKDIRS.value), OUT.value, constraints)
    print_places(OUT.value)


if __name__ == "__main__":
    cli.run(main, required=["workdirs", "out"])
