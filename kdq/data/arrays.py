"""Data sets of one's own: NumPy arrays of three splits in one `.npz` file.

For each split two arrays, `SPLIT_inputs` [n, ...] and `SPLIT_labels` [n]. `config.data.name` names
the file, and everything else goes as with a data set of TFDS.
"""

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kdq.data.errors import DataError
from kdq.fields import expand_user, unknown

# Files that unpack to more than both are bombs: arrays of data pack some 10 to 100 times smaller.
_MOST_BYTES, _MOST_RATIO = 2**30, 200
PARTS = ("inputs", "labels")
MOST_CLASSES = 2**22  # each has a name: more are most likely no classes at all
Split = tuple[np.ndarray, np.ndarray]  # inputs [n, ...], labels [n]


def save_arrays(path: str | os.PathLike[str], **splits: Split) -> Path:
    """Writes a data set of arrays; a file that already holds the same ones is left as it is.

    Args:
      path: the file, `mine.npz`.
      **splits: (inputs, labels) by name, most often train, validation and test. Inputs are uint8 or
        floats (kept as float32) [n, ...], of one shape and kind in all splits; labels are integers
        [n] from 0, and those of other splits are among the first's.

    Raises:
      DataError: arrays that don't fit, or a file that holds others.
    """
    path = Path(expand_user(path, "path"))
    if path.suffix != ".npz":
        raise DataError(f"{path}: want a name that ends in .npz")
    for name, split in splits.items():
        if not isinstance(split, tuple | list) or len(split) != 2:
            raise DataError(f"{name}: want a pair (inputs, labels), got {type(split).__name__}")
    checked = _checked({name: _split(name, *split) for name, split in splits.items()})
    arrays = {
        f"{name}_{part}": array
        for name, split in checked.items()
        for part, array in zip(PARTS, split, strict=True)
    }
    if path.exists():
        there = _read(path)
        differing = [name for name in {**arrays, **there} if not _is_same(name, arrays, there)]
        if not differing:
            return path
        raise DataError(
            f"{path} holds other arrays ({', '.join(differing)}): choose another folder, or delete "
            "that file"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")  # a reader never sees part of a file
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _is_same(name: str, arrays: Mapping[str, np.ndarray], there: Mapping[str, np.ndarray]) -> bool:
    if name not in arrays or name not in there:
        return False
    a, b = arrays[name], there[name]
    return a.dtype == b.dtype and np.array_equal(a, b)


def read_arrays(path: str | os.PathLike[str], split: str) -> tuple[Split, int]:
    """A split of such a file, and the number of classes of all. Raises DataError."""
    path = Path(path)
    found, arrays = {}, _read(path)
    for name in (key.removesuffix("_inputs") for key in arrays if key.endswith("_inputs")):
        if f"{name}_labels" not in arrays:
            raise DataError(f"{path} has {name}_inputs, but no {name}_labels")
        found[name] = _split(f"{path}: {name}", *(arrays[f"{name}_{part}"] for part in PARTS))
    if not found:
        raise DataError(f"{path} has {sorted(arrays)}: want train_inputs, train_labels and so on")
    if split not in found:
        raise DataError(unknown(f"split of {path}:", split, found))
    return _checked(found)[split], 1 + max(int(labels.max()) for _, labels in found.values())


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"there is no {path}")
    with path.open("rb") as file:  # np.load itself leaves a file that is broken open
        try:
            _check_sizes(path, file)
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except DataError:
            raise
        except Exception as error:  # a damaged archive makes Python's reader raise almost anything
            raise DataError(f"{path} is no .npz file of arrays: {error}") from error


def _check_sizes(path: Path, file: BinaryIO) -> None:
    """Raises DataError for arrays that are not as large as their headers state, or that take far
    more memory than the file: before any of them is unpacked."""
    total = 0
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as stream:
                version = np.lib.format.read_magic(stream)
                read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                    version, np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(stream)
                size = math.prod(shape) * dtype.itemsize
                if not dtype.hasobject and stream.tell() + size != entry.file_size:
                    raise DataError(
                        f"{path}: {entry.filename} is {dtype} {shape} by its header, which is not "
                        f"the {entry.file_size} bytes that it has"
                    )
            total += entry.file_size
    packed = path.stat().st_size
    if total > _MOST_BYTES and total > _MOST_RATIO * packed:
        raise DataError(
            f"{path} has {packed} bytes and unpacks to {total}: if that is meant, save it with "
            "np.savez, which packs nothing"
        )


def _split(where: str, inputs: np.ndarray, labels: np.ndarray) -> Split:
    """Checked, of the types that kdq works with."""
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    if np.issubdtype(inputs.dtype, np.floating):
        with np.errstate(over="ignore"):  # what float32 can't hold is refused below
            inputs = inputs.astype(np.float32)
    if inputs.dtype not in (np.uint8, np.float32) or inputs.ndim < 2 or not inputs.size:
        raise DataError(
            f"{where}: inputs are {inputs.dtype} {inputs.shape}; want uint8 or floats [n, ...]"
        )
    if not np.isfinite(inputs).all():
        bad = int(np.argmin(np.isfinite(inputs).reshape(len(inputs), -1).all(-1)))
        raise DataError(f"{where}: input {bad} is not finite")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != inputs.shape[:1]:
        raise DataError(
            f"{where}: labels are {labels.dtype} {labels.shape}; want integers "
            f"{inputs.shape[:1]}, a class for each input"
        )
    return np.ascontiguousarray(inputs), as_labels(labels, where)


def as_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels [n] as int32, which none of them leaves.

    Raises:
      DataError: no integers, or a label that is no class; says which example has it.
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels are {labels.dtype}; want integers")
    # Compared in their own type: in another, 2^32 + 1 could be 1.
    bad = (labels < 0) | (labels >= MOST_CLASSES)
    if bad.any():
        raise DataError(
            f"{where}: label {labels[bad][0]} of example {int(bad.argmax())}; want classes from 0 "
            f"to {MOST_CLASSES - 1}"
        )
    return labels.astype(np.int32)


def _checked(splits: Mapping[str, Split]) -> Mapping[str, Split]:
    """Splits that fit together."""
    (first, (inputs, labels)), *others = splits.items()
    for name, (more, classes) in others:
        if more.shape[1:] != inputs.shape[1:] or more.dtype != inputs.dtype:
            raise DataError(
                f"inputs of {name} are {more.dtype} {more.shape[1:]}, "
                f"of {first} {inputs.dtype} {inputs.shape[1:]}"
            )
        if classes.max() > labels.max():
            raise DataError(
                f"{name} has label {classes.max()}, {first} only those up to {labels.max()}"
            )
    return splits
