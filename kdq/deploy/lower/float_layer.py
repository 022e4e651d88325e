"""Layers that compute in float, with the weight that their codes stand for."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct

from kdq.deploy import primitives
from kdq.deploy.qtensor import QTensor
from kdq.quantize import kinds
from kdq.quantize.grid import Quantizer
from kdq.quantize.ste import fake_quantize
from kdq.types import Array

# Where a layer finds what it computes with: in "params", which Linen's lifted transforms slice.
LOWERED = "_lowered"


class FloatLayer(flax.struct.PyTreeNode):
    """A layer that multiplies floats: its weight is kept as codes if it was quantized."""

    weight: QTensor | None
    inputs: dict[str, Quantizer]  # what its inputs are rounded by


def call_in_float(
    lowered: FloatLayer, module: nn.Module, method: str, args: tuple, kw: Mapping[str, Any]
) -> Any:
    """Calls a bound layer with its rounded inputs and weight."""
    kind = kinds.kind_of(module)
    for name, place in kinds.operands(module, method).items():
        if name in lowered.inputs:
            value = fake_quantize(kinds.argument(args, kw, place), lowered.inputs[name])
            args, kw = kinds.replace_argument(args, kw, place, value)
    variables = dict(module.variables)
    params = {k: v for k, v in variables.get("params", {}).items() if k != LOWERED}
    if lowered.weight is not None:
        params[kind.weight] = primitives.weight(lowered.weight)
    free = module.clone(parent=None, name=None)
    return free.apply({**variables, "params": params}, *args, method=method, **kw)


def look_up(table: QTensor, module: nn.Embed, args: tuple, kw: Mapping[str, Any]) -> Array:
    """Returns the rows of a table, of which only those asked for become floats."""
    rows = primitives.rows(table, kinds.argument(args, kw, (0, "inputs")))
    return rows if module.dtype is None else rows.astype(module.dtype)
