"""In which order the pieces of a network run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Inputs
from kdq.quantize.network import Network, Weights
from kdq.quantize.paths import at_path, has_path
from kdq.quantize.walk import walk
from kdq.types import Variables


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
