"""Writes one page of the results of one or several workdirs, with tables and plots.

    python launch/report.py --workdirs=runs/digits --out=report

Writes report.html (which opens from disk and loads nothing), table.md, table.csv, table.tex and
plots/ as PNG and SVG. Seeds of the same arms are combined; results that must not be compared, such
as those on different data, are kept apart.
"""

from absl import flags

from kdq import cli

WORKDIRS = cli.define_paths("workdirs", None, "Folders of launch/compress.py or launch/train.py.")
OUT = cli.define_path("out", None, "Folder for the report; made if it does not exist.")
MAX_SIZE = flags.DEFINE_float("max_size_kib", None, "For the answer: largest file on disk, KiB.")
MAX_DROP = flags.DEFINE_float(
    "max_drop", None, "For the answer: largest drop from the teacher on validation, in points."
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
