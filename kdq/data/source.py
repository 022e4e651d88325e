"""A split of a data set: random access to its examples, as dicts of arrays."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kdq.fields import Mistake

Reader = Callable[[np.ndarray], dict[str, np.ndarray]]  # ids [n] -> {key: [n, ...]}


class DataError(Mistake, ValueError):
    """A data set, a split or a file that cannot be used as asked; the message says what to do."""


def damaged(name: str, folder: Any, error: Exception) -> DataError:
    """Returns the error for a prepared data set that can't be read."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    return DataError(
        f"{name} in {folder} can't be read ({reason}): remove that folder and prepare it again"
    )


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
        """Returns examples by id [n], in that order: `{key: [n, *shape]}`, the caller's to change.

        Raises IndexError for an id that is not in [0, len(self)).
        """
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(
                f"{self.name} {self.split}: ids from {ids.min()} to {ids.max()} asked for, "
                f"valid are 0 to {len(self) - 1}"
            )
        return self.reader(ids)


def hold_arrays(arrays: Mapping[str, np.ndarray], described: tuple = (), **fields: Any) -> Source:
    """Returns a source of arrays [n, ...] in memory, "image" first; `fields` are its others.

    Its digest is of the arrays and what describes them, by default the images' shape and type.
    """
    images = arrays["image"]
    digest = hashlib.sha256(repr(described or (images.shape, images.dtype.name)).encode())
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array))
    return Source(
        spec={key: Spec(array.shape[1:], array.dtype) for key, array in arrays.items()},
        num_examples=len(images),
        in_memory=True,
        digest=digest.hexdigest(),
        reader=lambda ids: {key: array[ids] for key, array in arrays.items()},
        **fields,
    )
