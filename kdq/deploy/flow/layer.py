"""An integer layer as one equation of a traced model, and the model as a list of equations."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend import core

from kdq.deploy import jaxprs, primitives
from kdq.deploy.contraction import INPUT, OTHER, WEIGHT, Kernel, Value, follow
from kdq.deploy.integer_layer import IntegerLayer
from kdq.deploy.qtensor import InputGrid
from kdq.quantize.tracing import sub_jaxpr
from kdq.types import Array


@dataclasses.dataclass(frozen=True)
class LayerCode:
    """The code of one call of a layer, in floats."""

    traced: core.ClosedJaxpr
    roles: tuple[str, ...]  # of its arguments: inputs, weight, bias
    operands: tuple[str, ...]  # names of its inputs


@dataclasses.dataclass(frozen=True)
class LayerCall(LayerCode):
    """The static part of one call of an integer layer."""

    path: str
    grids: tuple[Hashable, ...]  # of each input: the same for the same grid
    structure: Any  # of the IntegerLayer
    largest: int  # a bound of its sums

    def split(self, arrays: Sequence[Any]) -> tuple[Sequence[Any], IntegerLayer]:
        """Splits the arrays of the layer's equation into its inputs and what it computes with."""
        count = len(self.operands)
        return arrays[:count], jax.tree.unflatten(self.structure, arrays[count:])

    def place_operands(self, inputs: Sequence[Any], weight: Any) -> list[Value]:
        """Returns the arguments of the layer's own code, for `follow`; None for a bias."""
        values = {**dict(zip((INPUT, OTHER), inputs, strict=False)), WEIGHT: weight}
        return [(role, values.get(role)) for role in self.roles]


def run_layer(
    call: LayerCall,
    layer: IntegerLayer,
    codes: Sequence[Array],
    to: InputGrid | Literal["sums", "floats"],
    *,
    fixed_point: bool = False,
) -> Value:
    """Runs a layer on codes, to those of a grid, int32 sums or floats; returns as `follow` does."""
    layer = layer.replace(output=to if isinstance(to, InputGrid) else None)

    def multiply(kernel: Kernel, left: Array, right: Array) -> Array:
        result = primitives.multiply(kernel, left, right, layer, fixed_point)
        return primitives.to_float(result, layer.scale) if to == "floats" else result

    weight = None if layer.weight is None else layer.weight.codes
    zeros = {
        role: layer.inputs[name].zero_point
        for role, name in zip((INPUT, OTHER), call.operands, strict=False)
    }
    return follow(call.traced, call.place_operands(codes, weight), multiply, zeros=zeros)


def _run_between_floats(*arrays: Array, call: LayerCall) -> Array:
    inputs, layer = call.split(arrays)
    codes = [
        primitives.quantize(x, layer.inputs[name])
        for x, name in zip(inputs, call.operands, strict=True)
    ]
    return run_layer(call, layer, codes, "floats")[1].astype(call.traced.out_avals[0].dtype)


layer_p = primitives.primitive("kdq_integer_layer", _run_between_floats)


def call_layer(call: LayerCall, layer: IntegerLayer, inputs: Sequence[Array]) -> Array:
    """Calls a layer as one equation."""
    return layer_p.bind(*inputs, *jax.tree.leaves(layer), call=call)


def inline(traced: core.ClosedJaxpr, arguments: Sequence[Any], *, unroll: bool) -> core.ClosedJaxpr:
    """Returns a model without calls of other jaxprs; `unroll` writes scanned stacks of layers out.

    `arguments` are what it was traced with, or other arrays of these shapes.
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
            return run_turns(eqn.params, values)
        if turn and eqn.primitive is layer_p:
            call = eqn.params["call"]
            # The layers of a stack have grids of their own.
            grids = tuple((number, turn) for number in call.grids)
            call = dataclasses.replace(call, path=call.path + turn, grids=grids)
            return [layer_p.bind(*values, call=call)]
        return bind(eqn, values)

    def run_turns(params: Mapping[str, Any], values: Sequence[Any]) -> list[Any]:
        """Traces a scan turn by turn; returns its outputs."""
        shared = params["num_consts"]
        split = shared + params["num_carry"]
        carry, rows, step = values[shared:split], [], -1 if params["reverse"] else 1
        for i in range(params["length"])[::step]:
            inputs = [*values[:shared], *carry, *[array[i] for array in values[split:]]]
            outputs = _inline(params["jaxpr"], inputs, True, f"{turn}[{i}]")
            carry, row = outputs[: len(carry)], outputs[len(carry) :]
            rows.append(row)
        return [*carry, *[jnp.stack(column) for column in zip(*rows[::step], strict=True)]]

    return jaxprs.evaluate(traced, arguments, run_equation)


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation; what is stored as codes stays codes, even if known."""
    if eqn.primitive is primitives.weight.primitive:
        return [eqn.primitive.bind(*values, **eqn.params)]
    return jaxprs.bind(eqn, values)
