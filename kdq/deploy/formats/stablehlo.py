"""StableHLO: an integer model as a program that any JAX runs, without kdq or the model's code.

One file: the program as `jax.export` serializes it, and what it computes with, as arguments of the
program: codes in their own 2, 4 or 8 bits.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq.deploy.formats import container, packing
from kdq.deploy.lower.lowering import IntegerModel
from kdq.quantize.inputs import as_inputs
from kdq.types import Array

FORMAT_VERSION = 1
FEW_BITS = {"int2": 2, "int4": 4}


@dataclasses.dataclass(eq=False)
class Program:
    """A program that was loaded, with what it computes with."""

    exported: jax.export.Exported
    arguments: tuple[Array, ...]
    metadata: Mapping[str, Any]

    def __call__(self, *inputs: Array) -> Array:
        """The outputs, for a batch of any size; compiled once for each."""
        return self._call(self.arguments, *inputs)

    @functools.cached_property
    def _call(self) -> Callable[..., Array]:
        return jax.jit(self.exported.call)


def save_stablehlo(
    path: str | os.PathLike[str],
    lowered: IntegerModel,
    inputs: Array | tuple,
    *,
    platforms: Sequence[str] = ("cpu", "cuda"),
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes a program for batches of any size, atomically; returns the file's size in bytes.

    Args:
      path: where.
      lowered: see `lower`.
      inputs: an array with a leading batch axis, or a tuple of these; only the shapes matter.
      platforms: on which it will run; none of them has to be here.
      metadata: JSON-able, kept in the file.
    """
    leaves, structure = jax.tree.flatten(lowered)
    given = [_argument(leaf) for leaf in leaves]

    def function(leaves: tuple[Array, ...], *arrays: Array) -> Any:
        return jax.tree.unflatten(structure, leaves).apply(arrays)

    (batch,) = jax.export.symbolic_shape("batch")
    specs = as_inputs(inputs).shapes(batch)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in given)
    exported = jax.export.export(jax.jit(function), platforms=platforms)(shapes, *specs)
    document = {
        "format": FORMAT_VERSION,
        "arguments": [{"dtype": leaf.dtype.name, "shape": leaf.shape} for leaf in leaves],
        "metadata": dict(metadata or {}),
    }
    arrays = {f"{i:05}": _stored(np.asarray(leaf)) for i, leaf in enumerate(leaves)}
    arrays["program"] = np.frombuffer(exported.serialize(), np.uint8)
    return container.write(path, document, arrays)


def _argument(array: Array) -> Array:
    """An array as a program takes it: `jax.export` has no int2."""
    return array.astype(jnp.int4) if array.dtype == jnp.int2 else array


def _stored(array: np.ndarray) -> np.ndarray:
    bits = FEW_BITS.get(array.dtype.name)
    if bits is None:
        return array
    return packing.pack(array.astype(np.int8) + 2 ** (bits - 1), bits)


def load_stablehlo(path: str | os.PathLike[str]) -> Program:
    """Loads a program.

    Raises:
      FileNotFoundError: no such file.
      ContainerError: it is none, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no StableHLO program at {path}")
    try:
        document, arrays = container.read(path)
        if document["format"] != FORMAT_VERSION:
            raise container.ContainerError(
                f"format={document['format']!r}; this kdq reads {FORMAT_VERSION}"
            )
        arguments = tuple(
            _loaded(arrays[f"{i:05}"], **one) for i, one in enumerate(document["arguments"])
        )
        exported = jax.export.deserialize(bytearray(arrays["program"]))
    except (KeyError, TypeError, ValueError) as error:
        raise container.ContainerError(f"{path} is no StableHLO program of kdq: {error}") from error
    return Program(exported, arguments, document["metadata"])


def _loaded(array: np.ndarray, dtype: str, shape: Sequence[int]) -> Array:
    bits = FEW_BITS.get(dtype)
    if bits is None:
        return jnp.asarray(array.reshape(shape))
    codes = packing.unpack(array, bits, int(np.prod(shape))).astype(np.int8) - 2 ** (bits - 1)
    return _argument(jnp.asarray(codes.reshape(shape)).astype(dtype))
