"""The network of integer layers: what runs between them, and where numbers stay codes.

The model is traced with each integer layer as one opaque equation, floats in and floats out; alone
such a layer rounds its inputs to codes and its sums back to floats. Then the equations are run, and
what can be left out is: a layer whose output only reaches inputs with one grid, through operations
that move or compare numbers, makes the codes of that grid itself.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kdq.deploy import arithmetic, contraction, primitives
from kdq.deploy.contraction import INPUT, LAYOUT, OTHER, RESULT, Kernel
from kdq.deploy.integer_layer import IntegerLayer
from kdq.deploy.qtensor import InputGrid
from kdq.quantize.tracing import sub_jaxpr
from kdq.types import Array


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of an integer layer: what is static of it."""

    path: str
    traced: core.ClosedJaxpr  # the layer's own code, in floats
    roles: tuple[str, ...]  # of its arguments
    operands: tuple[str, ...]  # names of its inputs
    grids: tuple[Hashable, ...]  # of each input: the same for the same grid
    structure: Any  # of the IntegerLayer
    largest: int  # a bound of its sums


class Codes:
    """An array that is codes of a grid by now."""

    def __init__(self, codes: Array, grid: InputGrid):
        self.codes, self.grid = codes, grid


class Sums:
    """An array that is still int32 sums."""

    def __init__(self, total: Array, scale: Array, largest: int):
        self.total, self.scale, self.largest = total, scale, largest


class _Run(contraction.Steps):
    """A layer on codes."""

    def __init__(self, layer: IntegerLayer, to: InputGrid | type, fixed_point: bool):
        self.layer, self.to, self.fixed_point = layer, to, fixed_point

    def multiply(self, kernel: Kernel, left: Array, right: Array) -> Array:
        grid = self.to if isinstance(self.to, InputGrid) else None
        result = primitives.multiply(kernel, left, right, self.layer, grid, self.fixed_point)
        return primitives.to_float(result, self.layer.scale) if self.to is float else result

    def add_bias(self, result: Any, bias: Any) -> Any:
        return result  # it is in the sum already


def run_layer(
    call: LayerCall,
    layer: IntegerLayer,
    codes: Sequence[Array],
    to: InputGrid | type,
    *,
    fixed_point: bool = False,
) -> tuple[str, Array]:
    """A layer on the codes of its inputs, to codes of a grid, to `float` or to `int`: its sums.

    Returns what `follow` does.
    """
    given = dict(zip((INPUT, OTHER), codes, strict=False))
    if layer.weight is not None:
        given[contraction.WEIGHT] = layer.weight.codes
    operands = [(role, given.get(role)) for role in call.roles]
    zeros = {
        role: layer.inputs[name].zero_point
        for role, name in zip((INPUT, OTHER), call.operands, strict=False)
    }
    return contraction.follow(call.traced, operands, _Run(layer, to, fixed_point), zeros)


def _alone(*arrays: Array, call: LayerCall) -> Array:
    """A layer with floats in and out."""
    inputs, layer = split(arrays, call)
    codes = [
        primitives.quantize(x, layer.inputs[name])
        for x, name in zip(inputs, call.operands, strict=True)
    ]
    return run_layer(call, layer, codes, float)[1].astype(call.traced.out_avals[0].dtype)


def split(arrays: Sequence[Any], call: LayerCall) -> tuple[Sequence[Any], IntegerLayer]:
    """A layer's inputs and what it computes with, of the arrays of its equation."""
    count = len(call.operands)
    return arrays[:count], jax.tree.unflatten(call.structure, arrays[count:])


layer_p = primitives.primitive("kdq_integer_layer", _alone)


def call_layer(call: LayerCall, layer: IntegerLayer, inputs: Sequence[Array]) -> Array:
    """A layer as one equation."""
    return layer_p.bind(*inputs, *jax.tree.leaves(layer), call=call)


def run(
    traced: core.ClosedJaxpr,
    arguments: Sequence[Array],
    *,
    unroll: bool,
    made: dict[str, Array],
    fixed_point: bool,
) -> list[Array]:
    """The outputs of a traced network.

    Args:
      traced: it.
      arguments: what it was traced with, or other arrays of these shapes.
      unroll: write each layer of a scanned stack out.
      made: gets what integer layers make; see `IntegerModel.apply`.
      fixed_point: no floats between integer layers where there need not be; see `lower`.
    """
    flat = inlined(traced, arguments, unroll=unroll)
    return _run(flat.jaxpr, flat.consts, arguments, made, fixed_point)


def inlined(
    traced: core.ClosedJaxpr, arguments: Sequence[Array], *, unroll: bool
) -> core.ClosedJaxpr:
    """A network without calls of other jaxprs; arguments as of `run`."""
    flat = lambda *args: _inlined(traced.jaxpr, traced.consts, args, unroll, "")
    return jax.make_jaxpr(flat)(*arguments)


def _inlined(
    jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], unroll: bool, turn: str
) -> list[Any]:
    """The same, without calls of other jaxprs; `turn` names the turn of the loops it is in."""
    known = dict(zip([*jaxpr.invars, *jaxpr.constvars], [*arguments, *consts], strict=True))
    for eqn in jaxpr.eqns:
        given = [_value(known, atom) for atom in eqn.invars]
        inner = sub_jaxpr(eqn)
        if inner is not None:
            found = _inlined(inner.jaxpr, inner.consts, given, unroll, turn)
        elif unroll and eqn.primitive.name == "scan":
            found = _unrolled(eqn.params, given, turn)
        elif turn and eqn.primitive is layer_p:
            call = eqn.params["call"]
            # The layers of a stack have grids of their own.
            grids = tuple((number, turn) for number in call.grids)
            call = dataclasses.replace(call, path=call.path + turn, grids=grids)
            found = [layer_p.bind(*given, call=call)]
        else:
            found = _bind(eqn, given)
        known.update(zip(eqn.outvars, found, strict=True))
    return [_value(known, atom) for atom in jaxpr.outvars]


def _unrolled(params: Mapping[str, Any], given: Sequence[Any], turn: str) -> list[Any]:
    """The outputs of a scan, turn by turn."""
    inner, shared = params["jaxpr"], params["num_consts"]
    split = shared + params["num_carry"]
    consts, carry, stacked = given[:shared], given[shared:split], given[split:]
    turns = range(params["length"])
    made = []
    for i in reversed(turns) if params["reverse"] else turns:
        arguments = [*consts, *carry, *[array[i] for array in stacked]]
        found = _inlined(inner.jaxpr, inner.consts, arguments, True, f"{turn}[{i}]")
        carry, rest = found[: len(carry)], found[len(carry) :]
        made.append(rest)
    columns = zip(*(reversed(made) if params["reverse"] else made), strict=True)
    return [*carry, *[jnp.stack(column) for column in columns]]


def evaluate(traced: core.ClosedJaxpr, arguments: Sequence[Any], bind: Callable) -> list[Any]:
    """The outputs, with `bind(eqn, values)` for each equation."""
    jaxpr = traced.jaxpr
    names = [*jaxpr.invars, *jaxpr.constvars]
    known = dict(zip(names, [*arguments, *traced.consts], strict=True))
    for eqn in jaxpr.eqns:
        found = bind(eqn, [_value(known, atom) for atom in eqn.invars])
        known.update(
            zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True)
        )
    return [_value(known, atom) for atom in jaxpr.outvars]


def _value(known: Mapping, atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else known[atom]


def _bind(eqn: core.JaxprEqn, given: Sequence[Any]) -> Sequence[Any]:
    if eqn.primitive is primitives.weight_p:  # what is stored stays codes, even if it is known
        found = eqn.primitive.bind(*given, **eqn.params)
    else:
        found = contraction.bind(eqn, given)
    return found if eqn.primitive.multiple_results else [found]


def _run(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    made: dict[str, Array],
    fixed_point: bool,
) -> list[Array]:
    known = dict(zip([*jaxpr.invars, *jaxpr.constvars], [*arguments, *consts], strict=True))
    wanted = _wanted(jaxpr)
    rounded: dict[tuple[Any, Hashable], Array] = {}  # codes of floats that several layers take
    before, after = _around_layers(jaxpr)
    for eqn in before:
        given = [_value(known, atom) for atom in eqn.invars]
        known.update(zip(eqn.outvars, _bind(eqn, given), strict=True))
    grids: dict[Hashable, InputGrid] = {}
    for eqn in after:
        if eqn.primitive is layer_p:
            _, layer = split([known.get(a) for a in eqn.invars], eqn.params["call"])
            for number, name in _grids(eqn.params["call"]):
                grids.setdefault(number, layer.inputs[name])
    for eqn in after:
        given = [_value(known, atom) for atom in eqn.invars]
        if eqn.primitive is layer_p:
            grid = grids.get(wanted.get(eqn.outvars[0]))
            found = [_run_layer(eqn, given, rounded, grid, made, fixed_point)]
        else:
            found = _run_other(eqn, given, fixed_point)
        known.update(zip(eqn.outvars, found, strict=True))
    return [_as_float(_value(known, atom), atom.aval.dtype) for atom in jaxpr.outvars]


def _around_layers(jaxpr: core.Jaxpr) -> tuple[list[core.JaxprEqn], list[core.JaxprEqn]]:
    """The equations that need no layer's output, which make the arrays of layers, and the rest."""
    before, after, outputs = [], [], set()
    for eqn in jaxpr.eqns:
        atoms = {atom for atom in eqn.invars if isinstance(atom, core.Var)}
        if eqn.primitive is layer_p or not outputs.isdisjoint(atoms):
            outputs.update(eqn.outvars)
            after.append(eqn)
        else:
            before.append(eqn)
    return before, after


def _grids(call: LayerCall) -> list[tuple[Hashable, str]]:
    return list(zip(call.grids, call.operands, strict=True))


def _run_layer(
    eqn: core.JaxprEqn,
    given: Sequence[Any],
    rounded: dict[tuple[Any, Hashable], Array],
    grid: InputGrid | None,
    made: dict[str, Array],
    fixed_point: bool,
) -> Any:
    call = eqn.params["call"]
    path, calls = call.path, 1
    while f"{path}/{call.operands[0]}" in made:
        calls += 1
        path = f"{call.path}#{calls}"
    inputs, layer = split(given, call)
    codes = []
    for x, atom, (number, name) in zip(inputs, eqn.invars, _grids(call), strict=False):
        if isinstance(x, Codes):
            codes.append(x.codes)
            continue
        if (atom, number) not in rounded:
            rounded[atom, number] = _codes(x, atom.aval.dtype, layer.inputs[name], fixed_point)
        codes.append(rounded[atom, number])
    made.update(zip((f"{path}/{name}" for name in call.operands), codes, strict=True))
    if grid is not None:
        made[path] = run_layer(call, layer, codes, grid, fixed_point=fixed_point)[1]
        return Codes(made[path], grid)
    role, total = run_layer(call, layer, codes, int)
    if role == RESULT:
        made[path] = total
        return Sums(total, layer.scale, call.largest)
    return run_layer(call, layer, codes, float)[1].astype(eqn.outvars[0].aval.dtype)


def _codes(value: Any, dtype: Any, grid: InputGrid, fixed_point: bool) -> Array:
    """The codes of an input."""
    if fixed_point and isinstance(value, Sums):
        return arithmetic.requantize(value.total, value.scale, grid, fixed_point=True)
    return primitives.quantize(_as_float(value, dtype), grid)


def _as_float(value: Any, dtype: Any) -> Array:
    if isinstance(value, Codes):
        return primitives.dequantize(value.codes, value.grid).astype(dtype)
    if isinstance(value, Sums):
        return primitives.to_float(value.total, value.scale).astype(dtype)
    return value


def _run_other(eqn: core.JaxprEqn, given: Sequence[Any], fixed_point: bool) -> Sequence[Any]:
    """An equation between layers: on codes or sums where it means the same there."""
    if any(isinstance(value, Codes) for value in given):
        return [_on_codes(eqn, given)]
    if any(isinstance(value, Sums) for value in given):
        found = _on_sums(eqn, given, fixed_point)
        if found is not None:
            return [found]
        given = [
            _as_float(value, atom.aval.dtype) for value, atom in zip(given, eqn.invars, strict=True)
        ]
    return _bind(eqn, given)


def _on_codes(eqn: core.JaxprEqn, given: Sequence[Any]) -> Codes:
    """An operation of `_wanted`, on codes."""
    name, grid = eqn.primitive.name, next(v.grid for v in given if isinstance(v, Codes))
    zero = contraction.at_once(lambda zero: zero.astype(jnp.uint8), grid.zero_point)
    arrays = [value.codes if isinstance(value, Codes) else zero for value in given]
    if name == "max" and any(array is zero for array in arrays) and _is_known(zero, 0):
        return next(value for value in given if isinstance(value, Codes))  # no code is less
    if name == "max":
        return Codes(jnp.maximum(*arrays), grid)
    return Codes(_bind(eqn, arrays)[0], grid)


def _is_known(value: Any, number: int) -> bool:
    return not isinstance(value, jax.core.Tracer) and int(value) == number


def _on_sums(eqn: core.JaxprEqn, given: Sequence[Any], fixed_point: bool) -> Sums | None:
    """A rectifier, a mean or a factor, on sums; None for anything else."""
    name, sums = eqn.primitive.name, given[0]
    if fixed_point and name == "add" and all(isinstance(value, Sums) for value in given):
        return _added(*given)
    if not isinstance(sums, Sums) or any(isinstance(v, Sums) for v in given[1:]):
        return None
    total, scale, largest = sums.total, sums.scale, sums.largest
    if name == "max" and _is_zero(eqn.invars[1]):
        return Sums(jnp.maximum(total, 0), scale, largest)
    if name in ("mul", "div") and isinstance(eqn.invars[1], core.Literal):
        factor = float(eqn.invars[1].val)
        if factor > 0:
            # Rounded once, whether it is computed ahead of the program or in it.
            by = arithmetic.divide if name == "div" else lambda a, b: arithmetic.exactly(a * b)
            return Sums(total, by(scale, np.float32(factor)), largest)
    if name == "reduce_sum":
        axes = [axis - total.ndim for axis in eqn.params["axes"]]
        count = int(np.prod([total.shape[axis] for axis in axes]))
        shared = all(-axis > scale.ndim or scale.shape[axis] == 1 for axis in axes)
        if fixed_point:
            total, scale, largest = _shortened(sums, count)
        if shared and count * largest < 2**31:
            own = tuple(axis for axis in axes if -axis <= scale.ndim)
            return Sums(total.sum(axes, dtype=jnp.int32), scale.squeeze(own), count * largest)
    return None


ADDED = 2**29  # a bound of what two sums add up to


def _added(left: Sums, right: Sums) -> Sums:
    """Two arrays of sums, first brought to one scale at which they fit."""
    largest = lambda a, b: (jnp.max(a) * left.largest + jnp.max(b) * right.largest) / ADDED
    scale = contraction.at_once(largest, left.scale, right.scale)
    rescaled = [
        arithmetic.multiply_fixed_point(sums.total, arithmetic.divide(sums.scale, scale))
        for sums in (left, right)
    ]
    return Sums(rescaled[0] + rescaled[1], scale, ADDED + 2)


def _shortened(sums: Sums, count: int) -> tuple[Array, Array, int]:
    """Sums of which as many can be added, with their scale and bound."""
    shift = max(0, math.ceil(math.log2(count * (sums.largest + 1) / 2**31)))
    if not shift:
        return sums.total, sums.scale, sums.largest
    half = 1 << (shift - 1)
    return (sums.total + half) >> shift, sums.scale * 2**shift, (sums.largest >> shift) + 1


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, core.Literal) and np.ndim(atom.val) == 0 and atom.val == 0


def _passes(eqn: core.JaxprEqn) -> bool:
    """Whether an operation picks or moves numbers, and never makes new ones."""
    name, atoms = eqn.primitive.name, eqn.invars
    if name == "max":
        return all(not isinstance(a, core.Literal) or _is_zero(a) for a in atoms)
    if name == "pad":
        return _is_zero(atoms[1])
    return name in LAYOUT or name == "reduce_window_max"


def codes_alone(jaxpr: core.Jaxpr) -> set[core.Var]:
    """The arrays that layers make and that only go where they are rounded to one grid."""
    return set(_wanted(jaxpr))


def _wanted(jaxpr: core.Jaxpr) -> dict[core.Var, Hashable]:
    """The grid whose codes an array can be: for each that only goes where it is rounded so."""
    refused: set[core.Var] = set()
    while True:
        wanted = _backwards(jaxpr, refused)
        made = _forwards(jaxpr, wanted)
        wrong = {
            atom
            for eqn in jaxpr.eqns
            if eqn.primitive is not layer_p
            for atom in eqn.invars
            if isinstance(atom, core.Var) and atom in made and eqn.outvars[0] not in made
        }
        if not wrong:
            return {var: grid for var, grid in wanted.items() if var in made}
        refused |= wrong


def _backwards(jaxpr: core.Jaxpr, refused: set[core.Var]) -> dict[core.Var, Hashable]:
    """The one grid that everything that becomes of an array is rounded to."""
    uses: dict[core.Var, set[Hashable]] = {atom: {None} for atom in refused}
    for atom in jaxpr.outvars:
        if isinstance(atom, core.Var):
            uses.setdefault(atom, set()).add(None)
    for eqn in reversed(jaxpr.eqns):
        own = uses.get(eqn.outvars[0], {None})
        through = next(iter(own)) if len(own) == 1 and _passes(eqn) else None
        grids: Sequence[Hashable] = [through] * len(eqn.invars)
        if eqn.primitive is layer_p:
            call = eqn.params["call"]
            grids = [*call.grids, *[None] * (len(eqn.invars) - len(call.grids))]
        for atom, grid in zip(eqn.invars, grids, strict=True):
            if isinstance(atom, core.Var):
                uses.setdefault(atom, set()).add(grid)
    return {var: next(iter(of)) for var, of in uses.items() if len(of) == 1 and None not in of}


def _forwards(jaxpr: core.Jaxpr, wanted: Mapping[core.Var, int]) -> set[core.Var]:
    """The arrays that can be made as codes."""
    made: set[core.Var] = set()
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0]
        if out not in wanted:
            continue
        atoms = [a for a in eqn.invars if isinstance(a, core.Var)]
        if eqn.primitive is layer_p or (_passes(eqn) and all(a in made for a in atoms)):
            made.add(out)
    return made
