"""Where numbers stay codes: a dataflow analysis over the equations of a model.

Each array of the program has a value of a flat lattice

    nothing is known  <  the codes of one grid  <  floats,

the join of two different grids being floats. Two passes make one step:

- Backwards, an array's value is the join of what its uses need: a layer needs the grid of its
  input, an operation that only picks or moves numbers needs of its inputs what its output is,
  anything else, and the end of the program, needs floats.
- Forwards, codes are made by the layers whose output is on a grid, and by operations that pick
  or move numbers of codes alone.

An operation may then get codes without making any: an array that is joined by `max` or
`concatenate` with one that no layer made. It needs floats after all: that array is put among the
`floats` of the next step, and nothing ever leaves these. A step with more of them finds grids and
codes for fewer arrays, never for more, so that the steps end, after as many as there are arrays at
most, in the largest set of codes with the invariant: *what is made as codes of a grid only goes
into layers with that grid, and into operations that make codes of it again.*
"""

from collections.abc import Hashable, Sequence

import numpy as np
from jax.extend import core

from kdq.deploy.flow.layer import layer_p
from kdq.deploy.jaxprs import Atom
from kdq.quantize.tracing import LAYOUT

FLOATS = None  # the top of the lattice


def assign_grids(jaxpr: core.Jaxpr) -> dict[core.Var, Hashable]:
    """Returns the grid of each array that is made as codes."""
    floats: set[core.Var] = set()
    while True:
        values: dict[core.Var, Hashable] = dict.fromkeys(floats, FLOATS)

        def join(atom: Atom, value: Hashable, values: dict[core.Var, Hashable] = values) -> None:
            if isinstance(atom, core.Var):
                values[atom] = value if values.get(atom, value) == value else FLOATS

        # Backwards. All uses of an equation's output are behind it, so that its value is final.
        for atom in jaxpr.outvars:
            join(atom, FLOATS)
        for eqn in reversed(jaxpr.eqns):
            through = values.get(eqn.outvars[0], FLOATS) if passes_numbers(eqn) else FLOATS
            needs: Sequence[Hashable] = [through] * len(eqn.invars)
            if eqn.primitive is layer_p:
                grids = eqn.params["call"].grids
                needs = [*grids, *[FLOATS] * (len(eqn.invars) - len(grids))]
            for atom, value in zip(eqn.invars, needs, strict=True):
                join(atom, value)
        # Forwards.
        codes: dict[core.Var, Hashable] = {}
        wrong: set[core.Var] = set()
        for eqn in jaxpr.eqns:
            is_layer, out = eqn.primitive is layer_p, eqn.outvars[0]
            inputs = {atom for atom in eqn.invars if isinstance(atom, core.Var)}
            made = is_layer or (passes_numbers(eqn) and codes.keys() >= inputs)
            if made and values.get(out, FLOATS) is not FLOATS:
                codes[out] = values[out]
            elif not is_layer:
                wrong |= inputs & codes.keys()
        if not wrong:
            return codes
        floats |= wrong


def passes_numbers(eqn: core.JaxprEqn) -> bool:
    """Returns whether an operation picks or moves numbers (and zeros), and never makes new ones."""
    name, atoms = eqn.primitive.name, eqn.invars
    if name == "max":
        return all(not isinstance(a, core.Literal) or is_zero(a) for a in atoms)
    if name == "pad":
        return is_zero(atoms[1])
    return name in LAYOUT or name == "reduce_window_max"


def is_zero(atom: Atom) -> bool:
    """Returns whether an input of an equation is the number 0 itself."""
    return isinstance(atom, core.Literal) and np.ndim(atom.val) == 0 and atom.val == 0
