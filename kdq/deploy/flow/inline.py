"""A traced model without calls of other code, and with its loops written out if need be."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from kdq.deploy import jaxprs, primitives
from kdq.deploy.flow.layer import layer_p
from kdq.quantize.tracing import sub_jaxpr


def inline(traced: core.ClosedJaxpr, arguments: Sequence[Any], *, unroll: bool) -> core.ClosedJaxpr:
    """Returns a model without calls of other jaxprs.

    Args:
      traced: the model.
      arguments: what it was traced with, or other arrays of these shapes.
      unroll: write each layer of a scanned stack out.
    """
    return jax.make_jaxpr(lambda *args: _inline(traced, args, unroll, ""))(*arguments)


def _inline(
    traced: core.ClosedJaxpr, arguments: Sequence[Any], unroll: bool, turn: str
) -> list[Any]:
    """Traces the equations of a program; `turn` names the turn of the loops that it is in."""

    def run_equation(eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        inner = sub_jaxpr(eqn)
        if inner is not None:
            return _inline(inner, values, unroll, turn)
        if unroll and eqn.primitive.name == "scan":
            return _unroll(eqn.params, values, turn)
        if turn and eqn.primitive is layer_p:
            call = eqn.params["call"]
            # The layers of a stack have grids of their own.
            grids = tuple((number, turn) for number in call.grids)
            call = dataclasses.replace(call, path=call.path + turn, grids=grids)
            return [layer_p.bind(*values, call=call)]
        return bind(eqn, values)

    return jaxprs.evaluate(traced, arguments, run_equation)


def _unroll(params: Mapping[str, Any], values: Sequence[Any], turn: str) -> list[Any]:
    """Traces a scan turn by turn; returns its outputs."""
    inner, shared = params["jaxpr"], params["num_consts"]
    split = shared + params["num_carry"]
    consts, carry, stacked = values[:shared], values[shared:split], values[split:]
    turns = range(params["length"])
    rows = []
    for i in reversed(turns) if params["reverse"] else turns:
        arguments = [*consts, *carry, *[array[i] for array in stacked]]
        outputs = _inline(inner, arguments, True, f"{turn}[{i}]")
        carry, row = outputs[: len(carry)], outputs[len(carry) :]
        rows.append(row)
    columns = zip(*(reversed(rows) if params["reverse"] else rows), strict=True)
    return [*carry, *[jnp.stack(column) for column in columns]]


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation; what is stored as codes stays codes, even if known."""
    if eqn.primitive is primitives.weight.primitive:
        return [eqn.primitive.bind(*values, **eqn.params)]
    return jaxprs.bind(eqn, values)
