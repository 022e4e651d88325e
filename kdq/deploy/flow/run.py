"""Runs a model of integer layers: what runs between them, and where numbers stay codes.

The model is traced with each integer layer as one opaque equation, floats in and floats out; by
itself such a layer rounds its inputs to codes and its sums back to floats. Here its equations are
run one by one, and what can be left out is: a layer whose output `propagate` gives a grid makes the
codes of that grid itself. The sums of any other layer are kept as long as what follows is a factor,
a rectifier or a mean, and become floats where something else needs them.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kdq.deploy import arithmetic, primitives
from kdq.deploy.contraction import RESULT
from kdq.deploy.flow.layer import bind, inline, layer_p, run_layer
from kdq.deploy.flow.propagate import assign_grids, is_zero
from kdq.deploy.jaxprs import Atom, Environment, at_once
from kdq.deploy.qtensor import InputGrid
from kdq.types import Array

ADDED = 2**29  # a bound of what two sums add up to


class QuantizedValue(NamedTuple):
    """An array as the codes of a grid."""

    codes: Array
    grid: InputGrid


class Accumulator(NamedTuple):
    """An array as int32 sums."""

    total: Array
    scale: Array  # float32, broadcasts with the sums
    largest: int  # a bound of them


def run(
    traced: core.ClosedJaxpr,
    arguments: Sequence[Array],
    *,
    unroll: bool,
    integers: dict[str, Array],
    fixed_point: bool,
) -> list[Array]:
    """Returns the outputs of a traced model; `unroll` as in `inline`.

    `integers` gets what integer layers take and make, see `IntegerModel.apply`; with `fixed_point`
    there are no floats between integer layers where there need not be, see `lower`.
    """
    flat = inline(traced, arguments, unroll=unroll)
    # What needs no layer's output comes first: the grids of all layers are among it.
    before, after, outputs = [], [], set()
    for eqn in flat.jaxpr.eqns:
        atoms = {atom for atom in eqn.invars if isinstance(atom, core.Var)}
        if eqn.primitive is layer_p or not outputs.isdisjoint(atoms):
            outputs.update(eqn.outvars)
            after.append(eqn)
        else:
            before.append(eqn)
    environment = Environment(flat, arguments)
    environment.run(before, bind)
    grids: dict[Hashable, InputGrid] = {}
    for eqn in after:
        if eqn.primitive is layer_p:
            call = eqn.params["call"]
            _, layer = call.split([environment.get(atom) for atom in eqn.invars])
            for number, name in zip(call.grids, call.operands, strict=True):
                grids.setdefault(number, layer.inputs[name])
    made = {var: grids[number] for var, number in assign_grids(flat.jaxpr).items()}
    environment.run(after, _Interpreter(made, integers, fixed_point))
    pairs = zip(environment.outputs(), flat.jaxpr.outvars, strict=True)
    return [_to_floats(value, atom.aval.dtype) for value, atom in pairs]


class _Interpreter:
    """Runs equations of arrays, some of which are quantized values or accumulators.

    `grids` are of the arrays that are made as codes; see `run` for the rest.
    """

    def __init__(
        self, grids: dict[core.Var, InputGrid], integers: dict[str, Array], fixed_point: bool
    ):
        self.grids, self.integers, self.fixed_point = grids, integers, fixed_point
        self.rounded: dict[tuple[Atom, Hashable], Array] = {}  # floats that several layers take

    def __call__(self, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
        """Returns an equation's outputs: on codes or sums where it means the same there."""
        if eqn.primitive is layer_p:
            return [self._run_layer(eqn, values)]
        if any(isinstance(value, QuantizedValue) for value in values):
            return [_run_on_codes(eqn, values)]
        if any(isinstance(value, Accumulator) for value in values):
            total = _run_on_sums(eqn, values, self.fixed_point)
            if total is not None:
                return [total]
            pairs = zip(values, eqn.invars, strict=True)
            values = [_to_floats(value, atom.aval.dtype) for value, atom in pairs]
        return bind(eqn, values)

    def _run_layer(self, eqn: core.JaxprEqn, values: list[Any]) -> Any:
        call, grid = eqn.params["call"], self.grids.get(eqn.outvars[0])
        path, calls = call.path, 1
        while f"{path}/{call.operands[0]}" in self.integers:
            calls += 1
            path = f"{call.path}#{calls}"
        inputs, layer = call.split(values)
        codes = []
        for x, atom, number, name in zip(
            inputs, eqn.invars, call.grids, call.operands, strict=False
        ):
            key, steps = (atom, number), layer.inputs[name]
            if isinstance(x, QuantizedValue):
                codes.append(x.codes)
                continue
            if key not in self.rounded and self.fixed_point and isinstance(x, Accumulator):
                total = arithmetic.requantize(x.total, x.scale, steps, fixed_point=True)
                self.rounded[key] = total
            elif key not in self.rounded:
                self.rounded[key] = primitives.quantize(_to_floats(x, atom.aval.dtype), steps)
            codes.append(self.rounded[key])
        names = (f"{path}/{name}" for name in call.operands)
        self.integers.update(zip(names, codes, strict=True))
        if grid is not None:
            _, output = run_layer(call, layer, codes, grid, fixed_point=self.fixed_point)
            self.integers[path] = output
            return QuantizedValue(output, grid)
        role, total = run_layer(call, layer, codes, "sums")
        if role == RESULT:
            self.integers[path] = total
            return Accumulator(total, layer.scale, call.largest)
        # Rearranged sums do not broadcast with their scales.
        return run_layer(call, layer, codes, "floats")[1].astype(eqn.outvars[0].aval.dtype)


def _to_floats(value: Any, dtype: Any) -> Array:
    if isinstance(value, QuantizedValue):
        return primitives.dequantize(value.codes, value.grid).astype(dtype)
    if isinstance(value, Accumulator):
        return primitives.to_float(value.total, value.scale).astype(dtype)
    return value


def _run_on_codes(eqn: core.JaxprEqn, values: Sequence[Any]) -> QuantizedValue:
    """Runs an operation that passes numbers, of which 0 has the code of the zero point."""
    first = next(value for value in values if isinstance(value, QuantizedValue))
    zero = at_once(lambda zero: zero.astype(jnp.uint8), first.grid.zero_point)
    arrays = [value.codes if isinstance(value, QuantizedValue) else zero for value in values]
    if eqn.primitive.name != "max":
        return QuantizedValue(bind(eqn, arrays)[0], first.grid)
    known = not isinstance(zero, jax.core.Tracer)
    if any(array is zero for array in arrays) and known and int(zero) == 0:
        return first  # no code is less
    return QuantizedValue(jnp.maximum(*arrays), first.grid)


def _run_on_sums(
    eqn: core.JaxprEqn, values: Sequence[Any], fixed_point: bool
) -> Accumulator | None:
    """Runs a rectifier, a mean or a factor on sums; None for anything else."""
    name, sums = eqn.primitive.name, values[0]
    if fixed_point and name == "add" and all(isinstance(value, Accumulator) for value in values):
        # The scale at which the largest sums of both add up to ADDED.
        left, right = values
        fit = lambda a, b: (jnp.max(a) * left.largest + jnp.max(b) * right.largest) / ADDED
        scale = at_once(fit, left.scale, right.scale)
        rescaled = [
            arithmetic.multiply_fixed_point(total, arithmetic.divide(by, scale))
            for total, by, _ in values
        ]
        return Accumulator(rescaled[0] + rescaled[1], scale, ADDED + 2)  # each may be rounded up
    if not isinstance(sums, Accumulator) or any(isinstance(v, Accumulator) for v in values[1:]):
        return None
    total, scale, largest = sums
    if name == "max" and is_zero(eqn.invars[1]):
        return Accumulator(jnp.maximum(total, 0), scale, largest)
    if name in ("mul", "div") and isinstance(eqn.invars[1], core.Literal):
        factor = float(eqn.invars[1].val)
        if factor > 0:
            # Rounded once, whether it is computed ahead of the program or in it.
            by = arithmetic.divide if name == "div" else lambda a, b: arithmetic.exactly(a * b)
            return Accumulator(total, by(scale, np.float32(factor)), largest)
    if name == "reduce_sum":
        axes = [axis - total.ndim for axis in eqn.params["axes"]]
        count = int(np.prod([total.shape[axis] for axis in axes]))
        shared = all(-axis > scale.ndim or scale.shape[axis] == 1 for axis in axes)
        if fixed_point:
            total, scale, largest = shorten(sums, count)
        if shared and count * largest < 2**31:
            squeezed = tuple(axis for axis in axes if -axis <= scale.ndim)
            total = total.sum(axes, dtype=jnp.int32)
            return Accumulator(total, scale.squeeze(squeezed), count * largest)
    return None


def shorten(sums: Accumulator, count: int) -> Accumulator:
    """Drops as many low bits of sums, by a rounding shift, as let `count` of them fit int32."""
    shift = max(0, math.ceil(math.log2(count * (sums.largest + 1) / 2**31)))
    if not shift:
        return sums
    half = 1 << (shift - 1)
    return Accumulator(
        (sums.total + half) >> shift, sums.scale * 2**shift, (sums.largest >> shift) + 1
    )
