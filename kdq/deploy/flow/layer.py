"""An integer layer as one equation of a traced model, floats in and floats out."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import jax
from jax.extend import core

from kdq.deploy import primitives
from kdq.deploy.contraction import INPUT, OTHER, WEIGHT, Kernel, Value, follow
from kdq.deploy.integer_layer import IntegerLayer
from kdq.deploy.qtensor import InputGrid
from kdq.types import Array


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """The static part of one call of an integer layer."""

    path: str
    traced: core.ClosedJaxpr  # the layer's own code, in floats
    roles: tuple[str, ...]  # of its arguments
    operands: tuple[str, ...]  # names of its inputs
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
    """Runs a layer on the codes of its inputs, to the codes of a grid, to int32 sums or to floats.

    Returns what `follow` does.
    """
    grid = to if isinstance(to, InputGrid) else None

    def multiply(kernel: Kernel, left: Array, right: Array) -> Array:
        result = primitives.multiply(kernel, left, right, layer, grid, fixed_point)
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
