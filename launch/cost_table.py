r"""Measures what a network costs at given bits on this device, layer by layer, for later searches.

    python launch/cost_table.py --config=configs/search_fashion.py --model=student --out=costs.json

Choices of bits, runtime, batch and threads are those of config.search. A search here makes the
table itself; for another device run this there, and give the search the file:
--config.search.cost_tables=costs.json --config.search.other_device=True
"""

from absl import flags

from kdq import cli

CONFIG = cli.define_config()
MODEL = flags.DEFINE_string("model", "student", "The network, a key of config.models.")
OUT = cli.define_path("out", None, "The file.")
METRICS = flags.DEFINE_list("metrics", ["size", "latency"], "What is measured of size, latency.")


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
