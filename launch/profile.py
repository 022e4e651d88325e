"""Traces the training of an arm and prints where the time of a step goes.

    python launch/profile.py --config=configs/digits.py --workdir=runs/digits --arm=teacher

The arms on which it depends are run first, and kept in the workdir. Of the traced arm only the
trace is kept, under WORKDIR/profile/ARM: for Perfetto, xprof, or TensorBoard's profile plugin.
"""

from absl import flags

from kdq import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_workdir("Folder for the trace, and for the arms on which this one depends.")
ARM = flags.DEFINE_string("arm", None, "The arm whose training is traced.")
SEED = flags.DEFINE_integer("seed", 0, "The seed, one of config.seeds.")
STEPS = flags.DEFINE_integer("steps", 50, "Steps to trace.", lower_bound=1)
TOP = flags.DEFINE_integer("top", 15, "Number of operations to print.", lower_bound=1)


def main(_: list[str]) -> None:
    from kdq import config, experiment
    from kdq.report import progress

    CONFIG.value.seeds = (SEED.value,)
    with progress.reporter() as reporter:
        profiled = experiment.profile(
            config.freeze(CONFIG.value),
            WORKDIR.value,
            ARM.value,
            seed=SEED.value,
            steps=STEPS.value,
            progress=reporter,
        )
    progress.print_profile(profiled, TOP.value)


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir", "arm"])
