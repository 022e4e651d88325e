"""Following arrays through a traced model, into its loops: from where they come, and out again.

`marks` says of each call of a layer which parameter its weight is, or that it is made of several,
and in which loops the call is. `collect` brings arrays out of loops whose variables can't change,
as those of `nn.RNN`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from kdq.types import Array

# What only moves numbers, and is the same for codes; "pad" fills with what stands for 0.
LAYOUT = {
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "expand_dims", "rev", "slice"),
    *("concatenate", "copy", "copy_p", "pad"),
}
INLINE = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}


def sub_jaxpr(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Returns the code that an equation calls, if it does nothing else."""
    if eqn.primitive.name not in INLINE:
        return None
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr") or eqn.params.get("fun_jaxpr")
    return inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())


# A mark: `(weight, input)` or `(input,)`, and nothing out. `spread` is over how many turns of a
# `vmap` the one weight goes.
_mark_p = core.Primitive("kdq_mark")
_mark_p.multiple_results = True
_mark_p.def_impl(lambda *arrays, **params: [])
_mark_p.def_abstract_eval(lambda *avals, **params: [])


def _batched_mark(arrays: Any, axes: Any, *, name: Hashable, spread: int) -> tuple[list, list]:
    if len(arrays) == 2 and axes[0] is None and axes[1] is not None:
        spread *= arrays[1].shape[axes[1]]
    _mark_p.bind(*arrays, name=name, spread=spread)
    return [], []


def _marked_jvp(primals: Any, tangents: Any, **params: Any) -> tuple[list, list]:
    _mark_p.bind(*primals, **params)
    return [], []


batching.primitive_batchers[_mark_p] = _batched_mark
ad.primitive_jvps[_mark_p] = _marked_jvp


def mark(name: Hashable, weight: Array | None, x: Array) -> None:
    """Marks a call of a layer, for `marks` of a function that is traced."""
    _mark_p.bind(*([] if weight is None else [weight]), x, name=name, spread=1)


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where an array comes from."""

    leaf: int | None  # the argument that it is, or a slice of which by loops; None: it is computed
    sources: int = 0  # bits: the arguments that it depends on
    sliced: frozenset[int] = frozenset()  # the loops that slice it


@dataclasses.dataclass(frozen=True)
class Marked:
    """One mark."""

    name: Hashable
    leaf: int | None  # see `_Origin`: of the first marked array
    sources: frozenset[int]
    sliced: frozenset[int]  # the loops that slice the first array, by number
    loops: tuple[tuple[int, int], ...]  # (number, turns) of those around it, the outermost first
    spread: int  # turns of a `vmap` around it with one first array


def marks(function: Callable, *args: Any) -> list[Marked]:
    """The marks that a function leaves; nothing is computed.

    Args:
      function: of arrays.
      *args: pytrees of arrays, or of their shapes; a leaf's number is that of `jax.tree.leaves`.
    """
    traced = jax.make_jaxpr(function)(*args)
    origins = [_Origin(i, 1 << i) for i in range(len(traced.jaxpr.invars))]
    marked: list[Marked] = []
    _Follow(marked).run(traced.jaxpr, [_Origin(None)] * len(traced.consts), origins, ())
    return marked


class _Follow:
    """Follows origins forward through a jaxpr."""

    def __init__(self, marked: list[Marked]):
        self.marked, self.numbers = marked, itertools.count()

    def run(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[_Origin],
        arguments: Sequence[_Origin],
        loops: tuple[tuple[int, int], ...],
    ) -> list[_Origin]:
        """The origins of what a jaxpr returns."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
        origin = lambda atom: _Origin(None) if isinstance(atom, core.Literal) else known[atom]
        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [origin(atom) for atom in eqn.invars], loops)
            known.update(zip(eqn.outvars, results, strict=True))
        return [origin(atom) for atom in jaxpr.outvars]

    def equation(
        self, eqn: core.JaxprEqn, operands: list[_Origin], loops: tuple[tuple[int, int], ...]
    ) -> list[_Origin]:
        """The origins of what an equation returns."""
        if eqn.primitive is _mark_p:
            first, (name, spread) = operands[0], (eqn.params[k] for k in ("name", "spread"))
            bits = first.sources
            sources = frozenset(i for i in range(bits.bit_length()) if bits >> i & 1)
            self.marked.append(Marked(name, first.leaf, sources, first.sliced, loops, spread))
            return []
        inner = sub_jaxpr(eqn)
        if inner is not None:
            return self.inside(inner, operands, loops)
        params = eqn.params
        if eqn.primitive.name == "scan":
            return self.loop(params["jaxpr"], operands, params["num_consts"], params, loops)
        if eqn.primitive.name == "while":
            conditions = params["cond_nconsts"]
            body = params["body_jaxpr"]
            return self.loop(body, operands[conditions:], params["body_nconsts"], {}, loops)
        mixed = _mixed(operands)
        for branch in _jaxprs(eqn):
            count = len(branch.jaxpr.invars)
            taken = operands[-count:] if len(operands) >= count else [mixed] * count
            self.inside(branch, taken, loops)
        return [mixed] * len(eqn.outvars)

    def inside(
        self,
        closed: core.ClosedJaxpr,
        arguments: Sequence[_Origin],
        loops: tuple[tuple[int, int], ...],
    ) -> list[_Origin]:
        """`run` of a jaxpr with its constants."""
        return self.run(closed.jaxpr, [_Origin(None)] * len(closed.consts), arguments, loops)

    def loop(
        self,
        body: core.ClosedJaxpr,
        operands: list[_Origin],
        shared: int,
        params: dict[str, Any],
        loops: tuple[tuple[int, int], ...],
    ) -> list[_Origin]:
        """A scan, or a loop of unknown turns, whose operands start with `shared` constants.

        What it carries depends on all that goes in, unless each turn hands it on as it is.
        """
        number, mixed = next(self.numbers), _mixed(operands)
        variables = body.jaxpr.invars
        carries = params.get("num_carry", len(variables) - shared)
        end = shared + carries
        carried = [
            origin if before is after else mixed
            for origin, before, after in zip(
                operands[shared:end], variables[shared:end], body.jaxpr.outvars, strict=False
            )
        ]
        slices = [dataclasses.replace(o, sliced=o.sliced | {number}) for o in operands[end:]]
        turns = (number, params.get("length", 1))
        results = self.inside(body, [*operands[:shared], *carried, *slices], (*loops, turns))
        stacked = [_Origin(None, o.sources | mixed.sources) for o in results[carries:]]
        return [*carried, *stacked]


def _mixed(operands: Sequence[_Origin]) -> _Origin:
    """The origin of what is computed of all of these."""
    return _Origin(None, functools.reduce(lambda bits, o: bits | o.sources, operands, 0))


def _jaxprs(eqn: core.JaxprEqn) -> Iterator[core.ClosedJaxpr]:
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, core.Jaxpr):
                yield core.ClosedJaxpr(inner, ())
            elif isinstance(inner, core.ClosedJaxpr):
                yield inner


# What is collected: an array, out as it came in.
_seen_p = core.Primitive("kdq_seen")
_seen_p.def_impl(lambda x, *, name: x)
_seen_p.def_abstract_eval(lambda x, *, name: x)
mlir.register_lowering(_seen_p, lambda context, x, *, name: [x])
batching.primitive_batchers[_seen_p] = lambda arrays, axes, *, name: (
    _seen_p.bind(jnp.moveaxis(arrays[0], axes[0], 0), name=name),
    0,
)
ad.deflinear2(_seen_p, lambda cotangent, x, *, name: [cotangent])


def see(name: Hashable, x: Array) -> Array:
    """`x`, which `collect` of a function that is traced then returns too."""
    return _seen_p.bind(x, name=name)


def collect(function: Callable, *args: Any) -> tuple[Any, dict[Hashable, list[Array]]]:
    """`(function(*args), {name: what `see` got in each of its calls})`.

    What a loop sees has the loop's turns as its first axis. Loops of an unknown number of turns and
    branches return nothing.
    """
    traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    outputs, seen = _collected(traced.jaxpr, traced.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), outputs), seen


Seen = dict[Hashable, list[Array]]


def _collected(
    jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]
) -> tuple[list[Any], Seen]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    value = lambda atom: atom.val if isinstance(atom, core.Literal) else known[atom]
    seen: Seen = {}
    for eqn in jaxpr.eqns:
        operands = [value(atom) for atom in eqn.invars]
        results, inside = _collect_equation(eqn, operands)
        for name, arrays in inside.items():
            seen.setdefault(name, []).extend(arrays)
        known.update(zip(eqn.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars], seen


def _collect_equation(eqn: core.JaxprEqn, operands: list[Any]) -> tuple[Sequence[Any], Seen]:
    if eqn.primitive is _seen_p:
        return operands, {eqn.params["name"]: operands}
    inner = sub_jaxpr(eqn)
    if inner is not None:
        return _collected(inner.jaxpr, inner.consts, operands)
    if eqn.primitive.name == "scan" and _sees(eqn.params["jaxpr"].jaxpr):
        return _collect_scan(eqn.params, operands)
    results = eqn.primitive.bind(*operands, **eqn.params)
    return results if eqn.primitive.multiple_results else [results], {}


def _collect_scan(params: dict[str, Any], operands: list[Any]) -> tuple[list[Any], Seen]:
    body, shared = params["jaxpr"], params["num_consts"]
    split = shared + params["num_carry"]

    def turn(carry: list[Any], slices: list[Any]) -> tuple[list[Any], tuple[list[Any], Seen]]:
        results, seen = _collected(body.jaxpr, body.consts, [*operands[:shared], *carry, *slices])
        return results[: len(carry)], (results[len(carry) :], seen)

    carry, (stacked, seen) = jax.lax.scan(
        turn,
        operands[shared:split],
        operands[split:],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked], seen


def _sees(jaxpr: core.Jaxpr) -> bool:
    """Returns true if something in it is collected that can be."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is _seen_p:
            return True
        inner = sub_jaxpr(eqn)
        if inner is None and eqn.primitive.name == "scan":
            inner = eqn.params["jaxpr"]
        if inner is not None:
            return True
    return False
