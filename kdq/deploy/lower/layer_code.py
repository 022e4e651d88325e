"""The code of a layer alone, in floats, from which its integer layer is made."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.extend import core

from kdq.deploy.contraction import BIAS, INPUT, OTHER, WEIGHT
from kdq.quantize import kinds
from kdq.quantize.calls import ModuleCall, run
from kdq.quantize.inputs import Inputs
from kdq.types import Variables


@dataclasses.dataclass(frozen=True)
class LayerCode:
    """The code of one call of a layer, in floats."""

    code: core.ClosedJaxpr
    roles: tuple[str, ...]  # of its arguments: inputs, weight, bias
    operands: tuple[str, ...]  # names of its inputs


def layer_code(
    module: nn.Module,
    method: str,
    args: tuple,
    kwargs: Mapping[str, Any],
    params: Mapping[str, Any],
) -> LayerCode:
    """The code of a call of a layer.

    Args:
      module: bound.
      method: its method.
      args: of the call.
      kwargs: of the call.
      params: its weight and bias by name, or their shapes.
    """
    kind, where = kinds.kind_of(module), kinds.operands(module, method)
    free = module.clone(parent=None, name=None)

    def forward(*values: Any) -> Any:
        call_args, call_kwargs = args, dict(kwargs)
        for place, value in zip(where.values(), values, strict=False):
            call_args, call_kwargs = kinds.replace_argument(call_args, call_kwargs, place, value)
        arrays = dict(zip(params, values[len(where) :], strict=True))
        return free.apply({"params": arrays}, *call_args, method=method, **call_kwargs)

    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    inputs = [kinds.argument(args, kwargs, place) for place in where.values()]
    code = jax.make_jaxpr(forward)(*map(shaped, inputs), *map(shaped, params.values()))
    roles = (*(INPUT, OTHER)[: len(where)], *(WEIGHT if n == kind.weight else BIAS for n in params))
    return LayerCode(code, roles, tuple(where))


def list_code(
    model: nn.Module, variables: Variables, inputs: Inputs
) -> dict[str, list[LayerCode | str]]:
    """The code of every call of every layer that multiplies, or why it can't be taken out."""
    calls: dict[str, list[LayerCode | str]] = collections.defaultdict(list)
    inside = []

    def record(call: ModuleCall) -> Any:
        outputs = call.run()
        module, method, kind = call.module, call.method, call.kind
        if kind is None or inside:
            return outputs
        code = calls[call.path]
        if not kind.methods[method]:  # a lookup
            return outputs
        variables_of = {name: dict(held) for name, held in module.variables.items()}
        params = variables_of.pop("params", {})
        taken = {name: params.pop(name) for name in (kind.weight, "bias") if name in params}
        if more := [*params, *(name for name, held in variables_of.items() if held)]:
            code.append(f"it also computes with {sorted(more)}")
            return outputs
        inside.append(module)  # its code is a model of its own, which is intercepted too
        code.append(layer_code(module, method, call.args, call.kwargs, taken))
        inside.clear()
        return outputs

    def forward(variables: Variables, inputs: Inputs) -> Any:
        return run(model, variables, inputs, record)[0]

    jax.eval_shape(forward, variables, inputs)
    return calls
