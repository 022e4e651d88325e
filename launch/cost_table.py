"""Measures the cost of a network on this device, per layer and bits, for later searches.

    python launch/cost_table.py --config=configs/search_fashion.py --model=student --out=costs.json

The choices of bits, the runtime, the batch and the threads are those of config.search. A search
measures the table for its own machine; for another device run this program there, and pass the
file to the search:
--config.search.cost_tables=costs.json --config.search.other_device=True
"""

from absl import flags

from kdq import cli

CONFIG = cli.define_config()
MODEL = flags.DEFINE_string("model", "student", "The network, a key of config.models.")
OUT = cli.define_path("out", None, "File for the table.")
METRICS = flags.DEFINE_list("metrics", ["size", "latency"], "Costs to measure: size, latency.")


def main(_: list[str]) -> None:
    from kdq import config, experiment
    from kdq.report import progress, searches

    checked = config.freeze(CONFIG.value)
    with progress.reporter() as reporter:
        table = experiment.cost_table(checked, MODEL.value, METRICS.value, progress=reporter)
    table.save(OUT.value)
    searches.print_costs(table)


if __name__ == "__main__":
    cli.run(main, required=["config", "out"])
