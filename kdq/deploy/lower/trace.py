"""The layers of a model, as tracing shows them: their code in floats, and the norms behind them."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from kdq.deploy.contraction import BIAS, INPUT, OTHER, WEIGHT
from kdq.deploy.lower.folding import list_foldable
from kdq.quantize import kinds
from kdq.quantize.inputs import Inputs, run
from kdq.quantize.layers import LayerInfo, list_layers, list_unquantized, path_of
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


def trace_structure(model: nn.Module, variables: Variables, inputs: Inputs) -> Structure:
    """Traces a model, once for its fields and these shapes."""
    shaped = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), getattr(x, "dtype", jnp.result_type(x)))
    leaves, structure = jax.tree.flatten((variables, inputs))
    arguments = (model, structure, tuple(map(shaped, leaves)))
    try:
        hash((model, structure))
    except TypeError:  # it has a field that is a list
        return _trace_structure.__wrapped__(*arguments)
    return _trace_structure(*arguments)


@functools.lru_cache(maxsize=16)
def _trace_structure(model: nn.Module, structure: Any, leaves: tuple) -> Structure:
    variables, inputs = jax.tree.unflatten(structure, leaves)
    layers = list_layers(model, variables, inputs)
    return Structure(
        layers,
        list_unquantized(model, variables, inputs),
        list_code(model, variables, inputs),
        list_foldable(model, variables, inputs, layers),
    )


def trace_layer(
    module: nn.Module,
    method: str,
    args: tuple,
    kwargs: Mapping[str, Any],
    params: Mapping[str, Any],
) -> LayerCode:
    """Traces a call of a bound layer; `params` are its weight and bias by name, or their shapes."""
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
    """Returns the code of every call of the layers that multiply, or why it can't be taken out."""
    calls: dict[str, list[LayerCode | str]] = collections.defaultdict(list)
    inside = []

    def record(next_fun: Callable, args: tuple, kw: dict, context: Any) -> Any:
        outputs = next_fun(*args, **kw)
        module, method = context.module, context.method_name
        kind = kinds.kind_of(module)
        if kind is None or method not in kind.methods or inside:
            return outputs
        code = calls[path_of(module)]
        if not kind.methods[method]:  # a lookup
            return outputs
        variables_of = {name: dict(held) for name, held in module.variables.items()}
        params = variables_of.pop("params", {})
        taken = {name: params.pop(name) for name in (kind.weight, "bias") if name in params}
        if more := [*params, *(name for name, held in variables_of.items() if held)]:
            code.append(f"it also computes with {sorted(more)}")
            return outputs
        inside.append(module)  # its code is a model of its own, which is intercepted too
        code.append(trace_layer(module, method, args, kw, taken))
        inside.clear()
        return outputs

    def forward(variables: Variables, inputs: Inputs) -> Any:
        return run(model, variables, inputs, record)[0]

    jax.eval_shape(forward, variables, inputs)
    return calls
