"""Runs one arm of an experiment, and the arms it needs, for one seed or all.

    python launch/train.py --config=configs/digits.py --workdir=runs/digits --arm=kd --seed=0

The same config, workdir and files as launch/compress.py, which then finds the arm done.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from kdq import config, data, experiment
from kdq.report import progress, table

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, e.g. configs/digits.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for results; made if it does not exist.")
ARM = flags.DEFINE_string("arm", None, "The arm to run, a key of config.arms.")
SEED = flags.DEFINE_integer("seed", None, "One seed; all of config.seeds if not given.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    try:
        if SEED.value is not None:
            CONFIG.value.seeds = (SEED.value,)
        checked = config.freeze(CONFIG.value)
        with progress.reporter() as reporter:
            records = experiment.run(checked, WORKDIR.value, arms=[ARM.value], progress=reporter)
        table.print_table(table.rows(records))
    except (config.ConfigError, data.DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir", "arm"])
    logging.set_verbosity(logging.WARNING)
    app.run(main)
