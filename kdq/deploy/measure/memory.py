"""Memory: the bytes of a model's numbers when it is loaded, and while it runs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from kdq.deploy.formats.runtime import example_specs
from kdq.deploy.lower.model import IntegerModel
from kdq.quantize.inputs import Batch


def weight_bytes(lowered: IntegerModel) -> int:
    """Returns the bytes of the loaded model: codes in their own bits, scales, biases, all else."""
    loaded = jax.tree.leaves((lowered.variables, lowered.keywords))
    return -(-sum(map(_bits, loaded)) // 8)


def activation_bytes(lowered: IntegerModel, inputs: Batch) -> int:
    """Returns the most bytes that are alive at once between the operations on one example.

    An array is alive from the operation that makes it, or from the start if it is an input, to the
    last that takes it. A layer is one operation: what its kernel needs inside is not counted. Of
    `inputs`, arrays with a leading batch axis, only the shapes matter.
    """
    forward = lambda call: lowered.apply(call, unroll=True)
    program = jax.make_jaxpr(forward)(example_specs(inputs, 1)).jaxpr
    # The equations that the outputs need, of the inputs and not of weights alone.
    kept, needed = [], []
    used, reached = set(_variables(program.outvars)), set(program.invars)
    for eqn in reversed(program.eqns):
        if not used.isdisjoint(eqn.outvars):
            used |= set(_variables(eqn.invars))
            kept.append(eqn)
    for eqn in reversed(kept):
        if not reached.isdisjoint(_variables(eqn.invars)):
            reached |= set(eqn.outvars)
            needed.append(eqn)
    last = {atom: i for i, eqn in enumerate(needed) for atom in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(program.outvars), len(needed))
    alive = most = sum(_bits(var.aval) for var in program.invars)
    for i, eqn in enumerate(needed):
        alive += sum(_bits(out.aval) for out in eqn.outvars)
        most = max(most, alive)
        ended = {var for var in {*_variables(eqn.invars), *eqn.outvars} if last.get(var, i) == i}
        alive -= sum(_bits(var.aval) for var in ended & reached)
    return -(-most // 8)


def _variables(atoms: Any) -> list[core.Var]:
    return [atom for atom in atoms if isinstance(atom, core.Var)]


def _bits(array: Any) -> int:
    name = jnp.dtype(array.dtype).name
    return array.size * {"int2": 2, "int4": 4, "uint4": 4}.get(name, 8 * array.dtype.itemsize)
