"""Runs one arm of an experiment, and the arms on which it depends, for one seed or all.

    python launch/train.py --config=configs/digits.py --workdir=runs/digits --arm=kd --seed=0

It uses the same config, workdir and files as launch/compress.py, which then keeps the finished arm.
"""

from absl import flags

from kdq import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_workdir("Folder for results; made if it does not exist.")
ARM = flags.DEFINE_string("arm", None, "The arm to run, a key of config.arms.")
SEED = flags.DEFINE_integer("seed", None, "One seed; default all of config.seeds.")
TENSORBOARD = flags.DEFINE_boolean(
    "tensorboard",
    False,
    "Also write TensorBoard events of the training curves, to ARM/SEED/tensorboard.",
)
SHARED = flags.DEFINE_string(
    "shared", None, "Folder through which the runs of a sweep share arms; set by launch/sweep.py."
)


def main(_: list[str]) -> None:
    from kdq import config, experiment, processes
    from kdq.report import progress, table

    if SEED.value is not None:
        CONFIG.value.seeds = (SEED.value,)
    checked = config.freeze(CONFIG.value)
    with progress.reporter() as reporter:
        records = experiment.run(
            checked,
            WORKDIR.value,
            arms=[ARM.value],
            progress=reporter,
            tensorboard=TENSORBOARD.value,
            in_processes=True,
            shared=SHARED.value,
        )
    if processes.is_first():
        table.print_table(table.rows(records))
        folder, page = WORKDIR.value, "python launch/report.py"
        print(f"Results: {folder}/{ARM.value}; a page: {page} --workdirs={folder} --out={folder}")


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir", "arm"])
