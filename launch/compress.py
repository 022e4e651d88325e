"""Runs every arm of an experiment and prints the table: distill, quantize, or both?

    python launch/compress.py --config=configs/digits.py --workdir=runs/digits

Any field can be overridden: --config.data.batch_size=128
--config.distill.kd.terms.kl.temperature=2. The part after ":" in
--config=configs/digits.py:quick,seeds=3 is an argument of the config file. Run the same command
again after an interruption: finished arms are kept.
"""

from absl import flags

from kdq import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_workdir(
    "Folder for results, tables and checkpoints; made if it does not exist."
)
TENSORBOARD = flags.DEFINE_boolean(
    "tensorboard",
    False,
    "Also write TensorBoard events of the training curves, to ARM/SEED/tensorboard.",
)
SHARED = flags.DEFINE_string(
    "shared", None, "Folder through which the runs of a sweep share arms; set by launch/sweep.py."
)


def main(_: list[str]) -> None:
    from kdq import config, deploy, experiment, processes
    from kdq.report import progress, write

    checked = config.freeze(CONFIG.value)
    failed = None
    try:
        with progress.reporter() as reporter:
            records = experiment.run(
                checked,
                WORKDIR.value,
                progress=reporter,
                tensorboard=TENSORBOARD.value,
                in_processes=True,
                shared=SHARED.value,
            )
    except deploy.ExportError as error:  # when every arm has been run
        records, failed = experiment.finished(checked, WORKDIR.value), error
    if processes.is_first():
        write.write_report(records, WORKDIR.value)
    if failed is not None:
        raise failed


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir"])
