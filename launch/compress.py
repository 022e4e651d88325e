"""Runs every arm of an experiment and prints the table: distill, quantize, or both?

    python launch/compress.py --config=configs/digits.py --workdir=runs/digits

Any field can be overridden: --config.data.batch_size=128 --config.arms.kd.temperature=2. What comes
after ":" in --config=configs/digits.py:quick,seeds=3 goes to the config file itself. Run the same
command again after an interruption: what is done stays done.
"""

import logging as python_logging
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from kdq import config, data, experiment
from kdq.report import progress, write

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, e.g. configs/digits.py or configs/digits.py:quick."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for results, tables and checkpoints; made if it does not exist."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    try:
        checked = config.freeze(CONFIG.value)
        with progress.reporter() as reporter:
            records = experiment.run(checked, WORKDIR.value, progress=reporter)
        write.write_report(records, WORKDIR.value)
    except (config.ConfigError, data.DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    logging.set_verbosity(logging.WARNING)
    python_logging.getLogger("absl").propagate = True
    app.run(main)
