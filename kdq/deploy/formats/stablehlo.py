"""StableHLO: an integer model as a program that any JAX runs, without kdq or the model's code.

One file: the program as `jax.export` serializes it, and what it computes with, as arguments of the
program: codes in their own 2, 4 or 8 bits.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdq.deploy.formats import container
from kdq.deploy.formats.runtime import Runtime, any_batch, example_specs, flatten_inputs
from kdq.deploy.lower.model import IntegerModel
from kdq.quantize.inputs import Batch
from kdq.types import Array

FORMAT_VERSION = 1
FEW_BITS = {"int2": 2, "int4": 4}


@dataclasses.dataclass(eq=False)
class Program:
    """A loaded program, with what it computes with."""

    exported: jax.export.Exported
    arguments: tuple[Array, ...]
    metadata: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._call = jax.jit(self.exported.call)

    def __call__(self, *inputs: Array) -> Array:
        """Returns the outputs, for a batch of any size; compiled once for each."""
        return self._call(self.arguments, *inputs)

    def runtime(self) -> Runtime:
        """Returns the program as a function of a batch, as other formats are loaded."""
        return Runtime(lambda inputs: self(*jax.tree.leaves(inputs)))


def save_stablehlo(
    path: str | os.PathLike[str],
    lowered: IntegerModel,
    inputs: Batch,
    *,
    platforms: Sequence[str] = ("cpu", "cuda"),
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes a program for batches of any size, atomically; returns the file's size in bytes.

    Args:
      path: where.
      lowered: see `lower`.
      inputs: of one batch, arrays with a leading batch axis; only the shapes matter.
      platforms: on which it will run; none of them has to be here.
      metadata: JSON-able, kept in the file.
    """
    leaves, structure = jax.tree.flatten(lowered)
    specs = example_specs(inputs, any_batch())

    def function(leaves: tuple[Array, ...], *arrays: Array) -> Any:
        model = jax.tree.unflatten(structure, leaves)
        return flatten_inputs(model.apply, specs)[0](*arrays)

    shapes = tuple(jax.eval_shape(_as_argument, leaf) for leaf in leaves)
    export = jax.export.export(jax.jit(function), platforms=platforms)
    exported = export(shapes, *jax.tree.leaves(specs))
    document = {
        "format": FORMAT_VERSION,
        "arguments": [{"dtype": leaf.dtype.name, "shape": leaf.shape} for leaf in leaves],
        "metadata": dict(metadata or {}),
    }
    arrays = {f"{i:05}": _pack(np.asarray(leaf)) for i, leaf in enumerate(leaves)}
    arrays["program"] = np.frombuffer(exported.serialize(), np.uint8)
    return container.write(path, document, arrays)


def _as_argument(array: Array) -> Array:
    """Returns an array as a program takes it: `jax.export` has no int2."""
    return array.astype(jnp.int4) if array.dtype == jnp.int2 else array


def _pack(array: np.ndarray) -> np.ndarray:
    bits = FEW_BITS.get(array.dtype.name)
    return array if bits is None else container.pack(array.astype(np.int8) + 2 ** (bits - 1), bits)


def load_stablehlo(path: str | os.PathLike[str]) -> Program:
    """Loads a program. Raises FileNotFoundError, or ContainerError for a damaged or other file."""
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
            _unpack(arrays[f"{i:05}"], **about) for i, about in enumerate(document["arguments"])
        )
        exported = jax.export.deserialize(bytearray(arrays["program"]))
    except (KeyError, TypeError, ValueError) as error:
        raise container.ContainerError(f"{path} is no StableHLO program of kdq: {error}") from error
    return Program(exported, arguments, document["metadata"])


def _unpack(array: np.ndarray, dtype: str, shape: Sequence[int]) -> Array:
    bits = FEW_BITS.get(dtype)
    if bits is None:
        return jnp.asarray(array.reshape(shape))
    codes = container.unpack(array, bits, int(np.prod(shape))).astype(np.int8) - 2 ** (bits - 1)
    return _as_argument(jnp.asarray(codes.reshape(shape)).astype(dtype))
