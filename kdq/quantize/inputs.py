"""The arguments of a model's call as one value: whatever `model.apply` takes, arrays or not.

Every function of this package that runs a model makes an `Inputs` of its batch and its keywords
first. It is a pytree of the arrays; the rest (flags, names, `mutable`) belongs to its structure, so
that a `jit` compiles anew for another flag and not for another mask or key.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq.types import Variables

# One batch: an array; a tuple of positional arguments; a dict, a list or another pytree, which is
# one argument; or `Inputs`, where a batch has keyword arguments of its own.
Batch = Any


class _Leaf:
    """Stands for an array in the static part."""


@jax.tree_util.register_pytree_node_class
class Inputs:
    """The arguments of one call of a model, those after the variables: `Inputs(x, mask=mask)`.

    Where a function takes a batch, this may be one.
    """

    mask: Any = None  # [batch, positions] bool, or [batch]: which count; None: all. See `masked`.

    def __init__(self, *args: Any, **kwargs: Any):
        leaves, structure = jax.tree.flatten((args, kwargs))
        self._arrays = tuple(leaf for leaf in leaves if _is_array(leaf))
        self._static = structure, tuple(_Leaf if _is_array(leaf) else leaf for leaf in leaves)

    @property
    def args(self) -> tuple:
        """The positional arguments."""
        return self.unpack()[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments by keyword."""
        return self.unpack()[1]

    def unpack(self) -> tuple[tuple, dict[str, Any]]:
        """`(args, kwargs)`."""
        structure, template = self._static
        arrays = iter(self._arrays)
        leaves = [next(arrays) if leaf is _Leaf else leaf for leaf in template]
        return jax.tree.unflatten(structure, leaves)

    def tree_flatten(self) -> tuple[tuple, Any]:
        """The arrays, and all that is not arrays."""
        return (self._arrays, self.mask), self._static

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Iterable[Any]) -> "Inputs":
        """The inverse of `tree_flatten`."""
        inputs = object.__new__(cls)
        (inputs._arrays, inputs.mask), inputs._static = arrays, static
        return inputs

    @property
    def batch(self) -> Batch:
        """The batch of which `as_inputs` makes this."""
        args, kwargs = self.unpack()
        if kwargs:
            return self
        return args[0] if len(args) == 1 else args

    @property
    def rows(self) -> int | None:
        """Examples in the batch; None if no positional argument has a leading axis.

        The leading size that most of the positional arrays have; of as many, that of the first.
        """
        leaves = jax.tree.leaves(self.args) or jax.tree.leaves(self.kwargs)
        sizes = [leaf.shape[0] for leaf in leaves if _is_array(leaf) and leaf.shape]
        return max(sizes, key=sizes.count, default=None)

    def __repr__(self) -> str:
        args, kwargs = self.unpack()
        parts = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
        return f"Inputs({', '.join(parts)})"


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def as_inputs(batch: Batch) -> Inputs:
    """A batch as the arguments of a call."""
    if isinstance(batch, Inputs):
        return batch
    if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
        return Inputs(*batch)
    return Inputs(batch)  # a named tuple, a dict, a list: one argument


def masked(batch: Batch, mask: Any) -> Inputs:
    """A batch of which only some examples or positions count in what is gathered from it.

    `mask` is [batch] or [batch, positions], above 0 where they count. Calibration and the methods
    of `ptq` leave examples out before the model runs, and gather nothing at other positions; that
    these do not change what the model computes at those that count is up to the model's arguments.

    Raises ValueError for a mask that has not a row for each example.
    """
    args, kwargs = as_inputs(batch).unpack()
    inputs = Inputs(*args, **kwargs)
    if np.ndim(mask) not in (1, 2) or np.shape(mask)[0] != inputs.rows:
        raise ValueError(
            f"mask has shape {np.shape(mask)}: expected [batch] or [batch, positions] with a batch "
            f"of {inputs.rows}"
        )
    inputs.mask = np.asarray(mask) > 0
    return inputs


def _without_padding(inputs: Inputs) -> Inputs:
    """Without the examples that do not count; the mask goes where all that is left counts."""
    mask, rows = np.asarray(inputs.mask), inputs.rows
    kept = mask.reshape(rows, -1).any(1)
    has_rows = lambda a: a.shape[:1] == (rows,)
    if not kept.all():
        inputs = jax.tree.map(lambda a: a[kept] if has_rows(a) else a, inputs)
        mask = mask[kept]
    else:
        inputs = jax.tree.map(lambda a: a, inputs)
    inputs.mask = None if mask.all() else mask
    return inputs


def as_batches(batches: Iterable[Batch], function: str) -> Iterator[Inputs]:
    """Each batch as `Inputs`, one at a time, without the examples that its mask hides.

    Raises:
      ValueError: no batch, or one without examples; says whose.
      TypeError: `batches` is one batch, not several.
    """
    if isinstance(batches, Mapping | Inputs):
        raise TypeError(
            f"{function} expected batches, got one {type(batches).__name__}: give [batch]"
        )
    number = -1
    for number, batch in enumerate(batches):
        inputs = as_inputs(batch)
        if inputs.mask is not None:
            inputs = _without_padding(inputs)
        if inputs.rows == 0:
            raise ValueError(f"{function}: batch {number} is empty: expected at least one example")
        yield inputs
    if number < 0:
        raise ValueError(f"{function} got no batches: expected at least one")


def unboxed(variables: Variables) -> Variables:
    """Variables without the boxes of `nn.with_partitioning`, which say where arrays lie.

    `model.apply` takes both. A quantizer beside a weight, or a path into a layer, wants none.
    """
    return nn.unbox(variables) if _has_boxes(variables) else variables


def reboxed(variables: Variables, like: Variables) -> Variables:
    """The inverse of `unboxed`: `variables` in the boxes that `like` has."""
    return nn.meta.replace_boxed(like, variables) if _has_boxes(like) else variables


def _has_boxes(variables: Variables) -> bool:
    boxed = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    return any(map(boxed, jax.tree.leaves(variables, is_leaf=boxed)))
