"""Recommends from measured results whether to distill, to quantize, or to do both.

    python launch/advise.py --records=docs/results/digits.json --max_size_kib=5 --max_drop=1

Pass folders of experiments, files of records, or both. Results on different data, or timed on
different devices, are answered separately. Every number is cited, and for each missing result the
report gives the command that measures it.
"""

from absl import flags

from kdq import cli
from kdq.report.advisor import rules

WORKDIRS = cli.define_paths("workdirs", [], "Folders of launch/compress.py or train.py.")
RECORDS = cli.define_paths("records", [], "JSON lists of records, e.g. docs/results/digits.json.")
OUT = cli.define_path("out", None, "Markdown file for the report, which is printed as well.")
MAX_SIZE = flags.DEFINE_float("max_size_kib", None, "Largest file on disk, KiB.")
MAX_LATENCY = flags.DEFINE_float("max_latency_ms", None, "Longest time of one batch, ms.")
BATCH = flags.DEFINE_integer("batch", 1, "Examples in a batch, for latencies.")
MAX_ENERGY = flags.DEFINE_float("max_energy_uj", None, "Largest modelled energy per example, µJ.")
MIN_ACCURACY = flags.DEFINE_float(
    "min_accuracy", None, "Lowest (for error metrics: highest) value on validation."
)
MAX_DROP = flags.DEFINE_float(
    "max_drop", None, "Largest drop from the teacher on validation, points (of errors: percent)."
)
INTEGERS = flags.DEFINE_enum(
    "integers",
    "sub8",
    list(rules.INTEGERS),
    "Integers that the device supports: none (float only), 8 (8 bits only), sub8 (1 to 8 bits).",
)
MINUTES = flags.DEFINE_float(
    "training_minutes",
    None,
    "Longest training, in minutes on the machine of the records; 0 only calibrates.",
)
LABELS = flags.DEFINE_bool("labels", True, "Whether there are labels to train with.")
TEACHER = flags.DEFINE_bool("teacher", True, "Whether there is a trained teacher.")


def main(_: list[str]) -> None:
    from kdq import files
    from kdq.report.advise import advise
    from kdq.report.advisor.constraints import Constraints
    from kdq.report.cells import standard_output
    from kdq.report.workdirs import read_evidence

    constraints = Constraints(
        max_size_kib=MAX_SIZE.value,
        max_latency_ms=MAX_LATENCY.value,
        batch=BATCH.value,
        max_energy_uj=MAX_ENERGY.value,
        min_accuracy=MIN_ACCURACY.value,
        max_drop=MAX_DROP.value,
        integers=INTEGERS.value,
        training_minutes=MINUTES.value,
        labels=LABELS.value,
        teacher=TEACHER.value,
    )
    document = advise(read_evidence(WORKDIRS.value, RECORDS.value), constraints)
    document.print(standard_output())
    if OUT.value:
        files.write_atomic(OUT.value, document.markdown().encode())


if __name__ == "__main__":
    cli.run(main, required=[])
