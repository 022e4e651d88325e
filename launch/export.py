"""Exports a finished arm of an experiment and checks the files in their runtimes.

    python launch/export.py --workdir=runs/digits --arm=qat_w4a4 --format=onnx,stablehlo --out=DIR

Each file is run in its own runtime and must agree with the simulated model on nearly all of the
held-out examples (for classification: predict the same class). A disagreement is an error, which is
raised after all other files are written. DIR/manifest.json describes the files, and says why one is
missing.
"""

from absl import flags

from kdq import cli, schema

WORKDIR = cli.define_path("workdir", None, "Folder of launch/compress.py or launch/train.py.")
ARM = flags.DEFINE_string("arm", None, "The arm, a key of config.arms.")
FORMAT = flags.DEFINE_list("format", ["onnx"], f"Some of: {', '.join(schema.FORMATS)}.")
OUT = cli.define_path(
    "out",
    None,
    "Folder for the files, with subfolders for several seeds; default WORKDIR/ARM/SEED/export.",
)
SEED = flags.DEFINE_integer("seed", None, "One seed; default all finished seeds.")
cli.define_allow_models()


def main(_: list[str]) -> None:
    from kdq import experiment
    from kdq.experiment.exports import raise_failures
    from kdq.report import exports
    from kdq.report.metric import metric_of_records
    from kdq.report.workdirs import read_workdirs

    seeds = () if SEED.value is None else (SEED.value,)
    exported = experiment.export(
        WORKDIR.value, ARM.value, formats=FORMAT.value, out=OUT.value, seeds=seeds
    )
    (workdir,) = read_workdirs([WORKDIR.value])
    exports.print_table(exported, metric_of_records(workdir.records))
    raise_failures(
        {
            f"{name}, seed {seed}": entry["failed"]
            for seed, entries in exported.items()
            for name, entry in entries.items()
            if "failed" in entry
        }
    )


if __name__ == "__main__":
    cli.run(main, required=["workdir", "arm"])
