r"""Runs an experiment many times with different overrides, and prints one table of all runs.

    python launch/sweep.py --config=configs/digits.py --workdir=runs/temperature \
        --sweep=configs/sweeps/temperature.py --executor=local --workers=2

Each run is launch/compress.py (with --arm: launch/train.py) in WORKDIR/runs/NAME, with its output
in log.txt there. Run the same command again after an interruption or a failure: finished runs are
kept. See docs/sweeps.md.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from kdq import cli, sweep

CONFIG = cli.define_config()
WORKDIR = cli.define_path("workdir", None, "Folder for the runs and the table.")
SWEEP = cli.define_path("sweep", None, "File with get_sweep(), e.g. configs/sweeps/bits.py.")
ARM = flags.DEFINE_string("arm", "", "Only this arm of each run, and those on which it depends.")
EXECUTOR = flags.DEFINE_enum("executor", "local", list(sweep.EXECUTORS), "How runs are started.")
WORKERS = flags.DEFINE_integer(
    "workers", None, "Concurrent runs; default 1 for local and ray, all for slurm."
)
ADDRESS = flags.DEFINE_string(
    "address", None, "ray: address of a cluster; if not set, one is started here."
)
CLUSTER = flags.DEFINE_string("cluster", "slurm", "slurm: slurm, or for testing local or debug.")
SLURM = flags.DEFINE_multi_string("slurm", [], "slurm: an sbatch parameter, such as partition=gpu.")


def options(executor: str) -> dict:
    """Returns the options of an executor that the flags set."""
    if executor == "ray":
        return {"workers": WORKERS.value, "address": ADDRESS.value}
    if executor == "slurm":
        pairs = [text.partition("=") for text in SLURM.value]
        parameters = {name: value if equals else True for name, equals, value in pairs}
        folder = Path(WORKDIR.value, "slurm")
        of_slurm = {"folder": folder, "cluster": CLUSTER.value, "parameters": parameters}
        return {"workers": WORKERS.value, **of_slurm}
    return {"workers": WORKERS.value}


def main(_: list[str]) -> None:
    from kdq.sweep import run, runs

    config = flags.FLAGS[CONFIG.name]
    planned = runs.plan_runs(
        config_flags.get_config_filename(config),
        runs.read(SWEEP.value),
        Path(WORKDIR.value),
        launch=Path(__file__).resolve().parent,
        shared=config_flags.get_override_values(config),
        arm=ARM.value,
    )
    executor = sweep.executor(EXECUTOR.value, **options(EXECUTOR.value))
    sys.exit(0 if run.run(planned, executor, Path(WORKDIR.value)) else 1)


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir", "sweep"])
