"""Layers that multiply by something else than their parameter: weight norm, standardized weights.

To round the parameter of such a layer is not to round its weight, and an integer layer made of it
would multiply by the wrong numbers. They stay in float. A wrapper shows in where the layer's weight
comes from (`tracing.marks`); a class of one's own in what the layer's code does with it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
from jax.extend import core

from kdq.quantize import kinds
from kdq.quantize.tracing import LAYOUT, Marked, sub_jaxpr
from kdq.types import Variables

# What a weight may go through before it multiplies, and what multiplies by it or looks it up.
AS_IT_IS = LAYOUT | {"convert_element_type", "reduce_precision", "sharding_constraint", "name"}
PRODUCTS = {"dot_general", "conv_general_dilated", "gather"}
# Fields by which Flax lets a layer be told how to multiply.
INJECTED = (
    *("dot_general", "dot_general_cls", "promote_dtype"),
    *("conv_general_dilated", "conv_general_dilated_cls"),
)


def leaf_names(variables: Variables) -> list[str]:
    """The names of the leaves, by number: "params/Dense_0/kernel"."""
    paths = jax.tree_util.tree_flatten_with_path(variables)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def why_made(name: str, calls: Sequence[Marked], names: Sequence[str]) -> str:
    """Why the weight that a layer gets is not its parameter; "" if it is.

    `name` is the parameter's, as of `leaf_names`; `names` are those of the traced function's first
    arguments, further ones are inputs of the model.
    """
    for call in calls:
        if call.leaf is not None and call.leaf < len(names) and names[call.leaf] == name:
            continue
        sources = [names[i] for i in sorted(call.sources) if i < len(names)]
        if len(sources) < len(call.sources):
            sources.append("the inputs")
        weight = name.rsplit("/", 1)[1]
        return f"the {weight} that it multiplies by is computed, from {', '.join(sources)}"
    return ""


def why_changed(module: nn.Module, method: str, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Why what a layer multiplies by is not the weight that it gets; "" if it is."""
    if _is_flax_own(module, method):
        return ""
    kind, free = kinds.kind_of(module), module.clone(parent=None, name=None)
    variables = {name: dict(collection) for name, collection in module.variables.items()}
    weight = variables["params"].pop(kind.weight)

    def forward(weight: Any) -> Any:
        params = {**variables["params"], kind.weight: weight}
        return free.apply({**variables, "params": params}, *args, method=method, **kwargs)

    try:
        traced = jax.make_jaxpr(forward)(weight)
    except flax.errors.FlaxError as error:
        return f"{type(module).__name__} can't be run alone: {str(error).splitlines()[0]}"
    masked = {"mul"} if getattr(module, "mask", None) is not None else set()
    change = _change(_live(traced.jaxpr), set(traced.jaxpr.invars), AS_IT_IS | masked)
    if not change:
        return ""
    return f"{type(module).__name__} changes its {kind.weight} before it multiplies, by {change!r}"


def _is_flax_own(module: nn.Module, method: str) -> bool:
    """Returns true for a layer that computes as the class of Flax that it is, or extends."""
    flax_class = next(cls for cls in kinds.KINDS if isinstance(module, cls))
    same: Callable = lambda name: (
        inspect.getattr_static(type(module), name) is inspect.getattr_static(flax_class, name)
    )
    fields = flax_class.__dataclass_fields__
    return all(map(same, (method, "param"))) and all(
        getattr(module, name) is fields[name].default for name in INJECTED if name in fields
    )


def _live(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations that the results depend on."""
    needed = {atom for atom in jaxpr.outvars if isinstance(atom, core.Var)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            needed |= {atom for atom in eqn.invars if isinstance(atom, core.Var)}
            live.append(eqn)
    return live[::-1]


def _change(eqns: Sequence[core.JaxprEqn], weights: set[core.Var], harmless: set[str]) -> str:
    """The first operation that makes other numbers of `weights`, which gains what is like them."""
    for eqn in eqns:
        used = [isinstance(atom, core.Var) and atom in weights for atom in eqn.invars]
        if not any(used):
            continue
        inner = sub_jaxpr(eqn)
        if inner is not None:
            body = inner.jaxpr
            inside = {var for var, hit in zip(body.invars, used, strict=True) if hit}
            if change := _change(_live(body), inside, harmless):
                return change
            for var, atom in zip(eqn.outvars, body.outvars, strict=True):
                if isinstance(atom, core.Var) and atom in inside:
                    weights.add(var)
        elif eqn.primitive.name in harmless:
            weights |= set(eqn.outvars)
        elif eqn.primitive.name not in PRODUCTS:
            return eqn.primitive.name
    return ""
