"""Runs the equations of a jaxpr one by one, on other values than those it was traced with."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

Atom = core.Var | core.Literal  # an input of an equation
# `(equation, values of its inputs) -> values of its outputs`
RunEquation = Callable[[core.JaxprEqn, list[Any]], Sequence[Any]]
Constant = Callable[[Any], Any]  # makes the value of an array that the program itself holds


class Environment:
    """The values of a program's variables, as many as its equations have made by now."""

    def __init__(
        self,
        traced: core.ClosedJaxpr,
        arguments: Sequence[Any],
        constant: Constant = lambda array: array,
    ):
        self._constant, self._outputs = constant, traced.jaxpr.outvars
        self._values = dict(zip(traced.jaxpr.invars, arguments, strict=True))
        self._values.update(zip(traced.jaxpr.constvars, map(constant, traced.consts), strict=True))

    def __getitem__(self, atom: Atom) -> Any:
        return self._constant(atom.val) if isinstance(atom, core.Literal) else self._values[atom]

    def get(self, atom: Atom) -> Any:
        """Returns the value of an atom; None if no equation has made it yet."""
        return self[atom] if isinstance(atom, core.Literal) else self._values.get(atom)

    def run(self, equations: Iterable[core.JaxprEqn], run_equation: RunEquation) -> None:
        """Computes what the equations make, in their order."""
        for eqn in equations:
            outputs = run_equation(eqn, [self[atom] for atom in eqn.invars])
            self._values.update(zip(eqn.outvars, outputs, strict=True))

    def outputs(self) -> list[Any]:
        """Returns the values of the program's outputs, when all its equations are run."""
        return [self[atom] for atom in self._outputs]


def evaluate(
    traced: core.ClosedJaxpr,
    arguments: Sequence[Any],
    run_equation: RunEquation,
    constant: Constant = lambda array: array,
) -> list[Any]:
    """Returns the outputs of a program with `run_equation` for each of its equations."""
    environment = Environment(traced, arguments, constant)
    environment.run(traced.jaxpr.eqns, run_equation)
    return environment.outputs()


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation on other values, computed now if all are known."""
    function = lambda *arrays: eqn.primitive.bind(*arrays, **eqn.params)
    static = all(isinstance(size, int) for var in eqn.outvars for size in var.aval.shape)
    # The size of a batch, and arrays of as many examples, are known when a program runs.
    now = static and eqn.primitive.name != "dim_as_value"
    outputs = at_once(function, *values) if now else function(*values)
    return outputs if eqn.primitive.multiple_results else [outputs]


def at_once(function: Callable[..., Any], *values: Any) -> Any:
    """Returns `function(*values)`, computed now if all are known, whatever is being traced."""
    if any(isinstance(value, jax.core.Tracer) for value in values):
        return function(*values)
    with jax.ensure_compile_time_eval():
        return function(*values)
