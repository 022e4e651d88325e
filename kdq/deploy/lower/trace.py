"""The layers of a model, as tracing shows them: their code in floats, and the norms behind them."""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from kdq.deploy.contraction import BIAS, INPUT, OTHER, WEIGHT
from kdq.deploy.flow.layer import LayerCode
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Inputs
from kdq.quantize.layers import LayerInfo, list_layers, list_unquantized
from kdq.quantize.network import Network, Weights
from kdq.quantize.ptq.norms import Norm, list_norms
from kdq.types import Variables


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
        _list_code(network, variables, inputs),
        _list_foldable(network, variables, inputs, layers),
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


def _run_with(network: Network, handler: Callable[[ModuleCall], Any]) -> Callable[..., Any]:
    """Returns the float model as a function of variables and inputs, its calls handled."""
    return lambda variables, inputs: network.run(
        Weights(variables=variables, qparams={}), inputs, handler
    )[0]


def _list_code(
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

    jax.eval_shape(_run_with(network, record), variables, inputs)
    return calls


def _list_foldable(
    network: Network, variables: Variables, inputs: Inputs, layers: Mapping[str, LayerInfo]
) -> dict[str, Norm]:
    """Returns the batch norm of each layer whose output goes to that norm alone."""
    if "batch_stats" not in variables:
        return {}
    norms = {
        norm.source: norm
        for norm in list_norms(network, variables, inputs).values()
        if norm.source in layers and norm.stack == layers[norm.source].stack
    }
    behind = {norm.path for norm in norms.values()}

    def tag(call: ModuleCall) -> Any:
        path = call.path
        if call.method == "__call__" and path in behind:
            return call.argument(0, "x") * 1.0  # one use, whatever a norm does
        outputs = call.run()
        if call.method == "__call__" and path in norms:
            return checkpoint_name(outputs, path)
        return outputs

    uses: collections.Counter[str] = collections.Counter()
    _count_uses(jax.make_jaxpr(_run_with(network, tag))(variables, inputs).jaxpr, uses)
    return {path: norm for path, norm in norms.items() if uses[path] == 1}


def _count_uses(jaxpr: core.Jaxpr, uses: collections.Counter) -> None:
    """Counts how often each named array is used."""
    names = {
        eqn.outvars[0]: eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "name"
    }
    for eqn in jaxpr.eqns:
        uses.update(names[a] for a in eqn.invars if isinstance(a, core.Var) and a in names)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    _count_uses(inner.jaxpr, uses)
                elif isinstance(inner, core.Jaxpr):
                    _count_uses(inner, uses)
    uses.update(names[a] for a in jaxpr.outvars if isinstance(a, core.Var) and a in names)
