"""Cost tables of an experiment's models: read where there are some, else made and kept."""

import re
from collections.abc import Mapping, Sequence

from kdq import config as kdq_config
from kdq import provenance
from kdq.config import ConfigError, Search
from kdq.experiment.context import Context
from kdq.quantize.layers import LayerInfo
from kdq.search import cost, measured
from kdq.search.bank import Choices
from kdq.search.cost import CostTable

IMAGES = 256  # of the training split: quantizers need a range, whatever it is


def choices_of(search: Search, layers: Mapping[str, LayerInfo], where: str) -> Choices:
    """Returns the choices of each layer: those of the search, or the bits that it is fixed to.

    Raises ConfigError for a pattern that matches no layer.
    """
    for pattern in search.fixed:
        if not any(re.fullmatch(pattern, path) for path in layers):
            raise ConfigError(f"{where}.fixed: {pattern!r} matches none of {list(layers)}")
    choices = {}
    for path in layers:
        fixed = [b for pattern, b in search.fixed.items() if re.fullmatch(pattern, path)]
        choices[path] = (fixed[0],) if fixed else search.choices
    return choices


def build(
    context: Context, key: str, search: Search, choices: Choices, metrics: Sequence[str]
) -> CostTable:
    """Measures the table of the model `key` of an experiment, here and now."""
    return measured.build(
        kdq_config.to_json(context.experiment.models[key]),
        context.inputs.split("train", IMAGES)[0][context.inputs.key],
        choices,
        metrics,
        runtime=search.runtime,
        batch=search.batch,
        threads=search.threads,
        progress=context.progress.method,
    )


def table(context: Context, key: str, search: Search, choices: Choices) -> CostTable:
    """Returns the table of the model `key`, of `search.cost_tables`, of the workdir, or new in it.

    Raises:
      ConfigError: a file that is no table, or was measured on another device.
    """
    model, inputs = kdq_config.to_json(context.experiment.models[key]), context.inputs
    metrics = ["size"]
    if "latency" in (*search.most.set, *search.share.set):
        metrics.append("latency")
    device = provenance.device()
    for path in search.cost_tables:
        costs = cost.load(path, device=device, other_device=search.other_device)
        network = kdq_config.to_json(costs.model), costs.image_shape
        fits = network == (model, inputs.image.shape[1:])
        covers = all(
            metric in costs.metrics
            and set(bits) <= costs.metrics[metric].layers.get(path, {}).keys()
            for metric in metrics
            for path, bits in choices.items()
        )
        # Latencies, if any count, are those of the search's runtime.
        how = {"runtime": search.runtime, "batch": search.batch} if "latency" in metrics else {}
        if fits and covers and all(costs.conditions.get(k) == v for k, v in how.items()):
            return costs
    how = [search.runtime, search.batch, search.threads] if "latency" in metrics else []
    digest = kdq_config.digest([model, dict(choices), metrics, how, inputs.image.shape, device])
    path = context.store.workdir / "costs" / f"{key}-{digest}.json"
    if path.is_file():
        return cost.load(path, device=device)
    costs = build(context, key, search, choices, metrics)
    costs.save(path)
    return costs
