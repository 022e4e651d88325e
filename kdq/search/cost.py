"""Costs of a model, layer by layer, at given bits: counted, modelled, measured."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from kdq import files
from kdq.config import to_json
from kdq.deploy.measure import energy
from kdq.fields import ConfigError, build
from kdq.quantize.layers import FLOAT_BITS, LayerInfo, layer_bits
from kdq.search.bank import Choices, bits_of
from kdq.types import QParams


def macs(layers: Mapping[str, LayerInfo]) -> int:
    """Returns the multiply-accumulates for one example."""
    return sum(layer.macs for layer in layers.values())


def bops(layers: Mapping[str, LayerInfo], qparams: QParams) -> int:
    """Returns Σ MACs × weight bits × activation bits for one example (arXiv:2005.07093)."""
    return sum(layer.macs * math.prod(layer_bits(qparams, path)) for path, layer in layers.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One kind of cost of each layer at each of its choices."""

    layers: Mapping[str, Mapping[str, float]]  # {path: {"W4A8": value}}
    constant: float = 0.0  # at any bits
    worst: bool = False  # the cost of a model is that of its worst layer, not the sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostTable:
    """Costs of a network, as `{metric: {layer: {bits: value}}}`, and where they were measured."""

    model: Mapping[str, Any]  # the module's name and fields
    image_shape: tuple[int, ...]
    metrics: Mapping[str, Metric]
    # Device, cores, load; runtime and batch of a latency. Empty if nothing was measured.
    conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def total(self, metric: str, chosen: Mapping[str, str]) -> float:
        """Returns the cost of a model with the layers at the bits `{path: "W4A8"}`."""
        table = self.metrics[metric]
        values = [table.layers[path][bits] for path, bits in chosen.items()]
        return table.constant + (max(values) if table.worst else sum(values))

    def rows(self, metric: str, choices: Choices) -> list[list[float]]:
        """Returns the costs of each layer's choices, without the constant."""
        layers = self.metrics[metric].layers
        return [[layers[path][bits] for bits in row] for path, row in choices.items()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, atomically."""
        files.write_json(path, to_json(self))


def load(path: str | os.PathLike[str], *, device: str, other_device: bool = False) -> CostTable:
    """Returns a table that was saved.

    Raises ConfigError for no such file, no table, or, unless `other_device`, a table measured on
    another one than `device` (see `kdq.provenance.device`).
    """
    try:
        table = build(CostTable, files.read_json(path), str(path))
    except OSError as error:
        raise ConfigError(f"cost table {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no cost table: {error}") from error
    measured_on = table.conditions.get("device", device)
    if measured_on != device and not other_device:
        raise ConfigError(
            f"cost table {path} was measured on {measured_on!r}, and this is {device!r}: measure "
            "here (launch/cost_table.py), or allow it (config.search.other_device=True)"
        )
    return table


def counted(
    layers: Mapping[str, LayerInfo], choices: Choices, parameters: int
) -> dict[str, Metric]:
    """Returns the metrics that need no measuring; `parameters` are those of the whole model."""
    weights = sum(layer.weight_count for layer in layers.values())
    # Each layer's memories are those that its most bits need: energy is at most too much.
    most = {
        path: [max(pair) for pair in zip(*(_bits(layers[path], b) for b in choice), strict=True)]
        for path, choice in choices.items()
    }
    memories = energy.memories(layers, most)
    each = {
        "average_bits": lambda layer, w, a: layer.weight_count * w / max(weights, 1),
        "bops": lambda layer, w, a: float(layer.macs * w * a),
        "weight_memory": lambda layer, w, a: layer.weight_count * w / 8,
        "activation_memory": lambda layer, w, a: energy.moved_bits(layer, a) / 8,
        "energy": lambda layer, w, a: energy.layer_energy(layer, w, a, memories).total,
    }
    others = (parameters - weights) * FLOAT_BITS / 8  # that are no layer's weights
    return {
        metric: Metric(
            layers={
                path: {bits: value(layers[path], *_bits(layers[path], bits)) for bits in choice}
                for path, choice in choices.items()
            },
            constant=others if metric == "weight_memory" else 0.0,
            worst=metric == "activation_memory",
        )
        for metric, value in each.items()
    }


def _bits(layer: LayerInfo, choice: str) -> tuple[int, int]:
    """Returns bits of weights and inputs of a layer at a choice, as `layer_bits` would.

    A product has inputs alone, the second in the place of the weight; a table that is only looked
    up has no input that is quantized.
    """
    weights, activations = bits_of(choice)
    if "activations" not in layer.operands:
        activations = FLOAT_BITS
    return weights if layer.weight_name else activations, activations
