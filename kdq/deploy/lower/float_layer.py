"""Layers that compute in float, with the weight that their codes stand for."""

from typing import Any

import flax.struct

from kdq.deploy import primitives
from kdq.deploy.qtensor import QTensor
from kdq.quantize.calls import ModuleCall
from kdq.quantize.grid import Quantizer
from kdq.quantize.ste import fake_quantize
from kdq.types import Array

# Where a layer finds what it computes with: in "params", which Linen's lifted transforms slice.
LOWERED = "_lowered"


class FloatLayer(flax.struct.PyTreeNode):
    """A layer that multiplies floats: its weight is kept as codes if it was quantized."""

    weight: QTensor | None
    inputs: dict[str, Quantizer]  # what its inputs are rounded by


def call_in_float(lowered: FloatLayer, call: ModuleCall) -> Any:
    """Calls a layer with its rounded inputs and weight."""
    values = {
        name: fake_quantize(value, lowered.inputs[name])
        for name, value in call.operands.items()
        if name in lowered.inputs
    }
    call, variables = call.with_operands(**values), dict(call.module.variables)
    params = {k: v for k, v in variables.get("params", {}).items() if k != LOWERED}
    if lowered.weight is not None:
        params[call.kind.weight] = primitives.weight(lowered.weight)
    free = call.module.clone(parent=None, name=None)
    variables |= {"params": params}
    return free.apply(variables, *call.args, method=call.method, **call.kwargs)


def look_up(table: QTensor, call: ModuleCall) -> Array:
    """Returns the rows of a table, of which only those asked for become floats."""
    rows, dtype = primitives.rows(call.argument(0, "inputs"), table), call.module.dtype
    return rows if dtype is None else rows.astype(dtype)
