"""A split of a data set: random access to its examples, as dicts of arrays."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Reader = Callable[[np.ndarray], dict[str, np.ndarray]]  # ids [n] -> {key: [n, ...]}


class Spec(NamedTuple):
    """Shape and type of one example's array."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """Random access to the examples of one split; ids are 0 .. len(source) - 1."""

    name: str  # with its config, "emnist/balanced"
    version: str
    split: str  # as given, "train[:90%]"
    spec: Mapping[str, Spec]  # of each key of an example
    # Knowledge of the data set that its arrays do not hold: "class_names", a tuple by label.
    facts: Mapping[str, Any]
    num_examples: int
    in_memory: bool
    # In memory: sha256 of shapes and arrays. Otherwise (where reading everything would be too slow)
    # of name, version, split and the shards' names and sizes: the two differ.
    digest: str
    reader: Reader = dataclasses.field(repr=False)
    records: tuple[tuple[str, int, int], ...] = ()  # (file, first, one past the last) of each part

    def __len__(self) -> int:
        return self.num_examples

    def shared_with(self, other: "Source") -> int:
        """Returns how many examples are in both: all if the contents are equal, else by place."""
        if self.digest == other.digest:
            return len(self)
        return sum(
            max(0, min(end, last) - max(start, first))
            for file, start, end in self.records
            for place, first, last in other.records
            if file == place
        )

    def read(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Returns examples by id, in the order given: `{key: [n, *shape]}`, the caller's to change.

        Args:
          ids: [n] int, each in [0, len(self)).

        Raises:
          IndexError: an id out of range.
        """
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(
                f"{self.name} {self.split}: ids from {ids.min()} to {ids.max()} asked for, "
                f"valid are 0 to {len(self) - 1}"
            )
        return self.reader(ids)


def digest_arrays(inputs: np.ndarray, labels: np.ndarray) -> str:
    """Returns the SHA-256 of a split's arrays, with the shape and dtype of the inputs."""
    digest = hashlib.sha256(repr((inputs.shape, inputs.dtype.name)).encode())
    for array in (inputs, labels):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def hold_arrays(arrays: Mapping[str, np.ndarray], **fields: Any) -> Source:
    """Returns a source of arrays [n, ...] in memory; `fields` are its others."""
    return Source(
        spec={key: Spec(array.shape[1:], array.dtype) for key, array in arrays.items()},
        num_examples=len(next(iter(arrays.values()))),
        in_memory=True,
        reader=lambda ids: {key: array[ids] for key, array in arrays.items()},
        **fields,
    )
