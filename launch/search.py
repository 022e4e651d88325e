r"""Searches bits for each layer under a budget, then trains, exports and tabulates the result.

    python launch/search.py --config=configs/search_digits.py --workdir=runs/search \
        --config.search.method=knapsack --config.search.most.average_bits=3

config.search sets the choices, the method and the budgets. The arms on which the search depends are
run first. WORKDIR/searches/NAME/SEED has every evaluation (evaluations-DIGEST.jsonl) and the
result. The arms NAME_ptq (calibrated) and NAME_qad (trained as config.search.finetune) are added to
the table, with those of the best uniform bits under the same budgets (uniform_ptq, uniform_qad).
Run the same command again after an interruption: the search resumes.
"""

from absl import flags

from kdq import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_workdir("Folder for results; made if it does not exist.")
NAME = flags.DEFINE_string(
    "name", None, "Name of the search and of its arms; default config.search.method."
)


def main(_: list[str]) -> None:
    from kdq import config, experiment, processes
    from kdq.report import progress, searches, write

    name = NAME.value or CONFIG.value.search.method
    checked = experiment.with_search(config.freeze(CONFIG.value), WORKDIR.value, name)
    with progress.reporter() as reporter:
        arms = experiment.arms_of_search(checked, name)
        experiment.run(checked, WORKDIR.value, arms=arms, progress=reporter, in_processes=True)
    if processes.is_first():
        finished = experiment.finished(checked, WORKDIR.value)
        searches.print_policies([record for record in finished if record.arm in arms])
        write.write_report(finished, WORKDIR.value)


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir"])
