"""The layers of a model, as tracing shows them: their code in floats, and the norms behind them."""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from kdq.deploy.contraction import BIAS, INPUT, OTHER, WEIGHT
from kdq.deploy.lower.folding import list_foldable
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Inputs
from kdq.quantize.layers import LayerInfo, list_layers, list_unquantized
from kdq.quantize.network import Network, Weights
from kdq.quantize.ptq.norms import Norm
from kdq.types import Variables


@dataclasses.dataclass(frozen=True)
class LayerCode:
    """The code of one call of a layer, in floats."""

    code: core.ClosedJaxpr
    roles: tuple[str, ...]  # of its arguments: inputs, weight, bias
    operands: tuple[str, ...]  # names of its inputs


class Structure(NamedTuple):
    """A model's layers, by path."""

    layers: dict[str, LayerInfo]
    unquantized: dict[str, str]  # what no rule reaches, and why
    code: dict[str, list[LayerCode | str]]  # of the layers' calls
    norms: dict[str, Norm]  # that can be folded into the layer


def trace_structure(network: Network, variables: Variables, inputs: Inputs) -> Structure:
    """Traces a model, once for its fields and these shapes."""
    shaped = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), getattr(x, "dtype", jnp.result_type(x)))
    leaves, structure = jax.tree.flatten((variables, inputs))
    arguments = (network, structure, tuple(map(shaped, leaves)))
    try:
        hash((network, structure))
    except TypeError:  # it has a field that is a list
        return _trace_structure.__wrapped__(*arguments)
    return _trace_structure(*arguments)


@functools.lru_cache(maxsize=16)
def _trace_structure(network: Network, structure: Any, leaves: tuple) -> Structure:
    variables, inputs = jax.tree.unflatten(structure, leaves)
    layers = list_layers(network, variables, inputs)
    return Structure(
        layers,
        list_unquantized(network, variables, inputs),
        list_code(network, variables, inputs),
        list_foldable(network, variables, inputs, layers),
    )


def trace_layer(call: ModuleCall, params: Mapping[str, Any]) -> LayerCode:
    """Traces a call of a layer; `params` are its weight and bias by name, or their shapes."""
    kind, operands = call.kind, call.operands
    free = call.module.clone(parent=None, name=None)

    def forward(*values: Any) -> Any:
        new = call.with_operands(**dict(zip(operands, values, strict=False)))
        arrays = dict(zip(params, values[len(operands) :], strict=True))
        return free.apply({"params": arrays}, *new.args, method=call.method, **new.kwargs)

    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    code = jax.make_jaxpr(forward)(*map(shaped, operands.values()), *map(shaped, params.values()))
    roles = [WEIGHT if name == kind.weight else BIAS for name in params]
    return LayerCode(code, (*(INPUT, OTHER)[: len(operands)], *roles), tuple(operands))


def list_code(
    network: Network, variables: Variables, inputs: Inputs
) -> dict[str, list[LayerCode | str]]:
    """Returns the code of every call of the layers that multiply, or why it can't be taken out."""
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
        code.append(trace_layer(call, taken))
        inside.clear()
        return outputs

    def forward(variables: Variables, inputs: Inputs) -> Any:
        return network.run(Weights(variables=variables, qparams={}), inputs, record)[0]

    jax.eval_shape(forward, variables, inputs)
    return calls
