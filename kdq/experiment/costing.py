"""Cost tables of an experiment's models: read where there are some, else made and kept."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax

from kdq import config as kdq_config
from kdq import deploy, provenance
from kdq.config import ConfigError, Experiment, Search
from kdq.deploy.measure import latency
from kdq.experiment.inputs import Inputs
from kdq.experiment.progress import Progress
from kdq.quantize.layers import LayerInfo
from kdq.quantize.network import as_network
from kdq.search import cost, measured
from kdq.search.bank import Choices
from kdq.search.cost import CostTable
from kdq.types import Variables

IMAGES = 256  # of the training split: quantizers need a range, whatever it is


def choices_of(search: Search, layers: Mapping[str, LayerInfo], where: str) -> Choices:
    """The choices of each layer: those of the search, or what it is fixed to.

    Raises ConfigError for a pattern that matches no layer.
    """
    for pattern in search.fixed:
        if not any(re.fullmatch(pattern, path) for path in layers):
            raise ConfigError(f"{where}.fixed: {pattern!r} matches none of {list(layers)}")
    found = {}
    for path in layers:
        fixed = [b for pattern, b in search.fixed.items() if re.fullmatch(pattern, path)]
        found[path] = (fixed[0],) if fixed else search.choices
    return found


def build(
    experiment: Experiment,
    key: str,
    search: Search,
    choices: Choices,
    inputs: Inputs,
    metrics: Sequence[str],
    progress: Progress,
) -> CostTable:
    """Measures the table of the model `key` of an experiment, here and now."""
    return measured.build(
        kdq_config.to_json(experiment.models[key]),
        inputs.batches("train", size=IMAGES)[0]["image"],
        choices,
        metrics,
        runtime=search.runtime,
        batch=search.batch,
        threads=search.threads,
        progress=progress.method,
    )


def table(
    experiment: Experiment,
    key: str,
    search: Search,
    choices: Choices,
    inputs: Inputs,
    folder: Path,
    progress: Progress,
) -> CostTable:
    """The table of the model `key`, of `search.cost_tables`, of `folder`, or new in it.

    Raises:
      ConfigError: a file that is no table, or was measured on another device.
    """
    model = kdq_config.to_json(experiment.models[key])
    wanted = ["size"]
    if "latency" in (*search.most.set, *search.share.set):
        wanted.append("latency")
    device = provenance.device()
    for path in search.cost_tables:
        found = cost.load(path, device=device, other_device=search.other_device)
        of = kdq_config.to_json(found.model), found.image_shape
        fits = of == (model, inputs.image.shape[1:])
        if fits and _covers(found, choices, wanted) and _measured_so(found, search, wanted):
            return found
    how = [search.runtime, search.batch, search.threads] if "latency" in wanted else []
    digest = kdq_config.digest([model, dict(choices), wanted, how, inputs.image.shape, device])
    path = folder / f"{key}-{digest}.json"
    if path.is_file():
        return cost.load(path, device=device)
    found = build(experiment, key, search, choices, inputs, wanted, progress)
    found.save(path)
    return found


def shapes(model: nn.Module, inputs: Inputs) -> Variables:
    """Of a model's variables; nothing is computed."""
    return jax.eval_shape(as_network(model).init, jax.random.key(0), inputs.image)


def _covers(table: CostTable, choices: Choices, wanted: Sequence[str]) -> bool:
    return all(
        metric in table.metrics
        and all(
            set(own) <= table.metrics[metric].layers.get(path, {}).keys()
            for path, own in choices.items()
        )
        for metric in wanted
    )


def _measured_so(table: CostTable, search: Search, wanted: Sequence[str]) -> bool:
    """Whether a table's latencies, if they are wanted, are those of the search's runtime."""
    how = {"runtime": search.runtime, "batch": search.batch}
    return "latency" not in wanted or all(table.conditions.get(k) == v for k, v in how.items())


def check(search: Search, layers: Mapping[str, LayerInfo], where: str) -> None:
    """Raises ConfigError for what a search says of layers and costs that can't be."""
    choices_of(search, layers, where)
    if search.runtime not in deploy.FORMATS:
        raise ConfigError(kdq_config.unknown(f"{where}.runtime:", search.runtime, deploy.FORMATS))
    if "latency" in (*search.most.set, *search.share.set):
        try:
            deploy.check_formats((search.runtime,))
            latency.cores(search.threads)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{where}: a budget of latency: {error}") from error
