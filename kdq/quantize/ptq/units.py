"""Pieces of a network that can be run alone, and what they get when the whole runs.

A unit is a module of the model, a layer or a block, at one place of its stack. Units are treated in
the order in which they run, so that each sees the inputs that its quantized predecessors give it
and aims at the outputs of the float model: asymmetric reconstruction (AdaRound, 2004.10568).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq.quantize import masks as masks_lib
from kdq.quantize import simulate
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Inputs
from kdq.quantize.kinds import kind_of
from kdq.quantize.layers import list_layers
from kdq.quantize.network import Network, Weights
from kdq.quantize.paths import at_path, has_path
from kdq.quantize.walk import walk, without_extras
from kdq.types import Array, QParams, Variables


class _Array:
    """Stands for an array among the arguments of a call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a module: everything but the arrays. Hashable, for it is static."""

    method: str
    structure: Any  # of (args, kwargs)
    leaves: tuple[Any, ...]  # of (args, kwargs), `_Array` for an array
    rows: tuple[bool, ...]  # by array: whether it has a row for each row of the first
    shapes: tuple[jax.ShapeDtypeStruct, ...]  # by array
    outputs: tuple[bool, ...]  # by leaf of the output: whether it is float and has those rows

    def arguments(self, arrays: Sequence[Array]) -> tuple[tuple, dict[str, Any]]:
        """The (args, kwargs) of a call with these arrays."""
        arrays = iter(arrays)
        leaves = [next(arrays) if leaf is _Array else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A module to reconstruct."""

    path: str
    module: nn.Module  # unbound and without a name: equal modules are compiled once
    calls: tuple[Call, ...]  # more than one if it is shared
    shapes: Any  # of its own variables, at one place of the stack
    layers: tuple[str, ...]  # paths, relative to its own, of the quantized layers in it

    def stack(self, variables: Variables) -> tuple[int, ...]:
        """Leading axes of its variables in the model's."""
        whole = jax.tree.leaves(at_path(variables["params"], self.path))[0].shape
        shape = jax.tree.leaves(self.shapes["params"])[0].shape
        return whole[: len(whole) - len(shape)]

    def variables(self, variables: Variables, index: tuple[int, ...]) -> dict[str, Any]:
        """Its own variables, at one place of its stack."""

        def cut(shape: Any, whole: Array) -> Array:
            return whole[index] if len(shape.shape) < whole.ndim else whole

        return {
            name: jax.tree.map(cut, shape, at_path(variables[name], self.path))
            for name, shape in self.shapes.items()
        }

    def qparams(self, qparams: QParams, index: tuple[int, ...]) -> dict[str, Any]:
        """The quantizers in it, by relative path, at one place of its stack."""
        cut = lambda a: a[index]
        return {layer: jax.tree.map(cut, dict(qparams[self.full(layer)])) for layer in self.layers}

    def full(self, layer: str) -> str:
        """The path of one of its layers in the model."""
        return "/".join(name for name in (self.path, layer) if name)


def describe(
    network: Network,
    variables: Variables,
    inputs: Inputs,
    paths: Iterable[str],
    qparams: QParams,
) -> dict[str, Unit]:
    """The modules among `paths` that the model calls, in the order of their layers in `qparams`.

    Nothing is computed. Modules in a loop over one set of weights (`nn.RNN`) are left out. Of a
    layer every method of its kind is a call; of a block only `__call__`.
    """
    met: dict[str, tuple[nn.Module, Any, dict[str, Call]]] = {}
    layers = list_layers(network, variables, inputs)
    in_loop = [path for path, layer in layers.items() if layer.in_loop]
    around = {path for layer in in_loop for path in prefixes(layer)[1:-1]}

    def run(paths: tuple[str, ...], met: dict) -> bool:
        def forward(variables: Variables, inputs: Inputs) -> Any:
            weights = Weights(variables=variables, qparams={})
            return run_watched(network, weights, inputs, dict.fromkeys(paths, UNSEEN), met)

        jax.eval_shape(forward, variables, inputs)
        return True

    def can_be_seen(path: str) -> bool:
        """Returns true if a module around a layer in a loop is outside of the loop."""
        try:
            return run((path,), {})
        except (ValueError, flax.errors.FlaxError):  # what is shared by turns can't change in them
            return False

    outside = lambda path: path not in in_loop and (path not in around or can_be_seen(path))
    run(tuple(filter(outside, paths)), met)
    order = list(qparams)
    units = {}
    for path, (module, shapes, calls) in met.items():
        if not shapes.get("params"):  # a product of activations
            continue
        inside = tuple(p for p in order if p == path or not path or p.startswith(path + "/"))
        units[path] = Unit(
            path=path,
            module=module,
            calls=tuple(calls.values()),
            shapes=shapes,
            layers=tuple(p[len(path) :].lstrip("/") for p in inside),
        )
    first = lambda unit: min(map(order.index, map(unit.full, unit.layers)), default=len(order))
    return {unit.path: unit for unit in sorted(units.values(), key=first)}


class Extras(NamedTuple):
    """The extras of a watched module; see `walk`."""

    seen: dict[str, Any]  # by number of the call: (arrays in, leaves out)
    nudges: dict[str, Any]  # by number of the call: arrays that are added to its float outputs


UNSEEN = Extras({}, {})


def run_watched(
    network: Network,
    weights: Weights,
    inputs: Inputs,
    extras: Mapping[str, Extras],
    met: dict[str, tuple[nn.Module, Any, dict[str, Call]]] | None = None,
) -> tuple[Any, dict[str, Extras]]:
    """(outputs, extras) after a run in which modules leave their calls among their extras.

    Of a layer every method of its kind is a call; of a block only `__call__`. `met` gets (module,
    shapes of its variables, calls) by path.
    """
    active: list[str] = []

    def watch(layer_call: ModuleCall, before: Extras | None) -> tuple[Any, Extras | None]:
        module, path, method = layer_call.module, layer_call.path, layer_call.method
        watched = layer_call.kind if kind_of(module) else method == "__call__"
        if path not in extras or not watched or path in active:
            return layer_call.run(), before
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), without_extras(module.variables)
        )
        active.append(path)
        outputs = layer_call.run()
        active.pop()
        leaves, structure = jax.tree.flatten((layer_call.args, layer_call.kwargs))
        arrays = tuple(leaf for leaf in leaves if _is_array(leaf))
        returned, out_structure = jax.tree.flatten(outputs)
        call = _call(method, structure, leaves, arrays, returned)
        # Counted in the scope, because lifted transforms trace a module more than once.
        number = str(len(before.seen))
        if before.nudges:
            nudges = iter(before.nudges[number])
            pairs = zip(returned, call.outputs, strict=True)
            returned = [a + next(nudges) if kept else a for a, kept in pairs]
            outputs = jax.tree.unflatten(out_structure, returned)
        if met is not None:
            clone = module.clone(parent=None, name=None)
            met.setdefault(path, (clone, shapes, {}))[2][number] = call
        seen = before.seen | {number: (arrays, tuple(returned))}
        return outputs, before._replace(seen=seen)

    return walk(network, weights, inputs, watch, extras)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _call(method, structure, leaves, arrays, returned) -> Call:
    count = arrays[0].shape[:1] if arrays else None
    has_rows = lambda a: bool(count) and a.shape[:1] == count
    return Call(
        method=method,
        structure=structure,
        leaves=tuple(_Array if _is_array(leaf) else leaf for leaf in leaves),
        rows=tuple(map(has_rows, arrays)),
        shapes=tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays),
        outputs=tuple(
            _is_array(a) and jnp.issubdtype(a.dtype, jnp.floating) and has_rows(a) for a in returned
        ),
    )


@partial(jax.jit, static_argnames=("network", "paths"))
def _capture(weights, inputs, *, network, paths):
    """The arrays in and out of every call of the modules: one compilation serves all units."""
    _, left = run_watched(network, weights, inputs, dict.fromkeys(paths, UNSEEN))
    return {path: left[path].seen for path in paths}


@dataclasses.dataclass(frozen=True)
class Watch:
    """A model, and what is to be seen of it while it runs."""

    network: Network
    paths: tuple[str, ...]
    batches: Sequence[Inputs]

    def seen(
        self, variables: Variables, qparams: QParams, unit: Unit, index: tuple[int, ...]
    ) -> list[tuple[list[Array], list[Array]]]:
        """(arrays in, float arrays out) of each call of a unit, over all batches.

        Raises:
          ValueError: values that are not finite, or an argument that neither has a row for each
            example nor is the same in all batches; names the module.
        """
        parts = []
        for inputs in self.batches:
            weights = Weights(variables=variables, qparams=qparams)
            seen = _capture(weights, inputs, network=self.network, paths=self.paths)[unit.path]
            parts.append(jax.tree.map(lambda a: a[index], seen))
        joined = []
        for i, call in enumerate(unit.calls):
            arrays = zip(*(part[str(i)][0] for part in parts), strict=True)
            returned = zip(*(part[str(i)][1] for part in parts), strict=True)
            joined.append(
                (
                    [_join(a, r, unit.path) for a, r in zip(arrays, call.rows, strict=True)],
                    [
                        _join(a, True, unit.path)
                        for a, r in zip(returned, call.outputs, strict=True)
                        if r
                    ],
                )
            )
        return joined

    def counted(self, arrays: Sequence[Array]) -> list[Array] | None:
        """Which elements of joined arrays are no padding, in shapes that broadcast to theirs.

        None if all are. An array without positions counts whole.
        """
        masks = [inputs.mask for inputs in self.batches]
        shape = next((mask.shape for mask in masks if mask is not None), None)
        if shape is None:
            return None
        rows = (inputs.rows for inputs in self.batches)
        whole = [
            np.ones((n, *shape[1:]), bool) if mask is None else np.asarray(mask)
            for n, mask in zip(rows, masks, strict=True)
        ]
        mask = jnp.concatenate(whole)
        pairs = [(array, masks_lib.counted(mask, array)) for array in arrays]
        return [jnp.ones((1,) * a.ndim, bool) if c is None else c for a, c in pairs]


def _join(parts: tuple[Array, ...], has_rows: bool, path: str) -> Array:
    if has_rows:
        whole = jnp.concatenate(parts)
        if jnp.issubdtype(whole.dtype, jnp.floating) and not bool(jnp.isfinite(whole).all()):
            raise ValueError(f"NaN or infinity in the inputs or outputs of module {path!r}")
        return whole
    if not all(np.array_equal(parts[0], part) for part in parts[1:]):
        raise ValueError(
            f"module {path!r} gets an array of shape {parts[0].shape} that differs from batch to "
            "batch and has no row for each example: it can't be run alone"
        )
    return parts[0]


def why_not(unit: Unit) -> str:
    """Why a unit can't be run alone; "" if it can."""
    if not all(any(call.outputs) for call in unit.calls):
        return "its output has no row for each row of its first input"
    for call in unit.calls:
        try:
            hash(call)
        except TypeError as error:
            return f"an argument is neither an array nor hashable: {error}"

        def run(variables: Variables, arrays: Sequence[Array], call: Call = call) -> Any:
            args, kwargs = call.arguments(arrays)
            call_inputs = Inputs(*args, method=call.method, **kwargs)
            return simulate.run(unit.module, variables, {}, call_inputs)[0]

        try:
            jax.eval_shape(run, unit.shapes, call.shapes)
        except flax.errors.FlaxError as error:
            return f"it needs what is outside of it: {error}"
    return ""


def in_order(
    stacks: Mapping[str, tuple[int, ...]], roots: Sequence[str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each piece at each place of its stack; under one root all of the first place come first.

    `stacks` are {path: leading axes of its parameters} in the order in which the model calls them.
    """
    groups: dict[Any, list[tuple[str, tuple[int, ...]]]] = {}
    for path, stack in stacks.items():
        root = next((root for root in roots if stack and _inside(path, root)), (path,))
        groups.setdefault(root, []).extend((path, index) for index in np.ndindex(*stack))
    for group in groups.values():
        yield from sorted(group, key=lambda place: place[1][:1])


def stack_roots(network: Network, variables: Variables, inputs: Inputs) -> list[str]:
    """Paths of the outermost modules whose parameters a lifted transform slices."""
    sliced: list[str] = []

    def record(call: ModuleCall, extras: Any) -> tuple[Any, Any]:
        path = call.path
        if has_path(variables["params"], path):
            shapes = [a.shape for a in jax.tree.leaves(call.module.variables.get("params", {}))]
            whole = [a.shape for a in jax.tree.leaves(at_path(variables["params"], path))]
            # Some calls of lifted transforms are made on a module that has nothing yet.
            if shapes and shapes != whole and not any(_inside(path, root) for root in sliced):
                sliced.append(path)
        return call.run(), extras

    def forward(variables: Variables, inputs: Inputs) -> Any:
        return walk(network, Weights(variables=variables, qparams={}), inputs, record)[0]

    jax.eval_shape(forward, variables, inputs)
    return sliced


def _inside(path: str, root: str) -> bool:
    return root in ("", path) or path.startswith(root + "/")


def prefixes(path: str) -> list[str]:
    """The paths of the modules around a module, the model's own ("") first, and its own."""
    names = path.split("/") if path else []
    return ["/".join(names[:i]) for i in range(len(names) + 1)]
