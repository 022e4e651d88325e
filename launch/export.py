"""Exports an arm of an experiment that has been run, and says what runtimes make of it.

    python launch/export.py --workdir=runs/digits --arm=qat_w4a4 --format=onnx,stablehlo --out=DIR

Each file is run in its own runtime: it must agree with the simulated model on nearly all of the
held-out examples (have its class, for classification), or it is an error, which comes when all
other files are there. DIR/manifest.json says what the files are, and why one is not.
"""

from absl import flags

from kdq import cli, schema

WORKDIR = cli.define_path("workdir", None, "The folder of launch/compress.py or train.py.")
ARM = flags.DEFINE_string("arm", None, "The arm, a key of config.arms.")
FORMAT = flags.DEFINE_list("format", ["onnx"], f"Some of: {', '.join(schema.FORMATS)}.")
OUT = cli.define_path(
    "out", None, "Folder for the files, one a seed in it; WORKDIR/ARM/SEED/export if not given."
)
SEED = flags.DEFINE_integer("seed", None, "One seed; all that have been run if not given.")
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
