"""Your own data sets: NumPy arrays of three splits in one `.npz` file.

For each split two arrays, `SPLIT_inputs` [n, ...] and `SPLIT_labels` [n] or, of several labels or
real targets, [n, outputs] float. `config.data.name` names the file, and everything else goes as
with a data set of TFDS.
"""

import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kdq.data.source import DataError, Source, hold_arrays
from kdq.fields import expand_user, unknown

# Files that unpack to more than both are bombs: arrays of data pack some 10 to 100 times smaller.
_MOST_BYTES, _MOST_RATIO = 2**30, 200
PARTS = ("inputs", "labels")
MOST_CLASSES = 2**22  # each has a name: more are most likely no classes at all
Split = tuple[np.ndarray, np.ndarray]  # inputs [n, ...], labels [n] or [n, outputs]


def save_arrays(path: str | os.PathLike[str], **splits: Split) -> Path:
    """Writes a data set of arrays; a file that already holds the same ones is left as it is.

    Args:
      path: the file, `mine.npz`.
      **splits: (inputs, labels) by name, most often train, validation and test. Inputs are uint8 or
        floats (kept as float32) [n, ...], of one shape and kind in all splits; labels are integers
        [n] from 0, and those of other splits are among the first's; or floats (kept as float32) [n]
        or [n, outputs], real targets or labels 0 and 1.

    Raises:
      DataError: arrays that don't fit, or a file that holds others.
    """
    path = Path(expand_user(path, "path"))
    if path.suffix != ".npz":
        raise DataError(f"{path}: expected a name that ends in .npz")
    for name, split in splits.items():
        if not isinstance(split, tuple | list) or len(split) != 2:
            raise DataError(f"{name}: expected a pair (inputs, labels), got {type(split).__name__}")
    checked = _checked({name: _split(name, *split) for name, split in splits.items()})
    arrays = {
        f"{name}_{part}": array
        for name, split in checked.items()
        for part, array in zip(PARTS, split, strict=True)
    }
    if path.exists():
        there = _read(path)
        differing = [
            key
            for key in {**arrays, **there}
            if not (key in arrays and key in there)
            or arrays[key].dtype != there[key].dtype
            or not np.array_equal(arrays[key], there[key])
        ]
        if not differing:
            return path
        raise DataError(
            f"{path} holds other arrays ({', '.join(differing)}): choose another folder, or delete "
            "that file"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kdq-incomplete-", dir=path.parent) as scratch:
        temporary = Path(scratch, path.name)  # a reader never sees part of a file
        np.savez(temporary, **arrays)
        temporary.replace(path)
    return path


def open_file(path: Path, split: str) -> Source:
    """Opens a split of a file that `save_arrays` wrote. Raises DataError."""
    splits, arrays = {}, _read(path)
    for name in (key.removesuffix("_inputs") for key in arrays if key.endswith("_inputs")):
        if f"{name}_labels" not in arrays:
            raise DataError(f"{path} has {name}_inputs, but no {name}_labels")
        splits[name] = _split(f"{path}: {name}", *(arrays[f"{name}_{part}"] for part in PARTS))
    if not splits:
        raise DataError(
            f"{path} has {sorted(arrays)}: expected train_inputs, train_labels and so on"
        )
    if split not in splits:
        raise DataError(unknown(f"split of {path}:", split, splits))
    every = [labels for _, labels in _checked(splits).values()]
    classes = None if _is_real(every[0]) else 1 + max(int(labels.max()) for labels in every)
    return from_arrays(*splits[split], name=path.name, split=split, classes=classes)


def from_arrays(
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    name: str = "arrays",
    split: str = "train",
    classes: int | None = None,
) -> Source:
    """Returns arrays in memory as a split of a data set.

    `inputs` are uint8 or float32 [n, ...]; `labels` int [n], of so many `classes` from 0 (None: up
    to the largest label), or float [n] or [n, outputs]. Raises DataError for labels that are no
    classes, or floats that are not finite.
    """
    labels = as_labels(labels, f"{name} {split}")
    facts = {}
    if not _is_real(labels):
        facts["class_names"] = tuple(map(str, range(classes or int(labels.max()) + 1)))
    arrays = {"image": inputs, "label": labels}
    return hold_arrays(arrays, name=name, version="", split=split, facts=facts)


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
    """Raises DataError, before anything is unpacked, for arrays that are not as large as their
    headers state, or that take far more memory than the file."""
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
    """Returns arrays of the types that kdq works with; raises DataError for others."""
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    if not (inputs.dtype == np.uint8 or _is_real(inputs)) or inputs.ndim < 2 or not inputs.size:
        raise DataError(
            f"{where}: inputs are {inputs.dtype} {inputs.shape}; expected uint8 or floats [n, ...]"
        )
    if _is_real(inputs):
        inputs = _as_float32(inputs, f"{where}: input")
    real = _is_real(labels) and labels.ndim == 2 and labels.size and len(labels) == len(inputs)
    if not (real or (labels.dtype.kind in "iuf" and labels.shape == inputs.shape[:1])):
        raise DataError(
            f"{where}: labels are {labels.dtype} {labels.shape}; expected integers "
            f"{inputs.shape[:1]}, a class for each input, or floats [n] or [n, outputs]"
        )
    return np.ascontiguousarray(inputs), as_labels(labels, where)


def _is_real(labels: np.ndarray) -> bool:
    return np.issubdtype(labels.dtype, np.floating)


def _as_float32(values: np.ndarray, where: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinite is refused below
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        bad = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(-1)))
        raise DataError(f"{where} {bad} is not finite")
    return values


def as_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Returns labels [n] as int32; real ones [n, ...] as float32.

    Raises DataError for what is no number, no class or not finite; it names the example.
    """
    labels = np.asarray(labels)
    if _is_real(labels):
        return _as_float32(labels, f"{where}: label of example")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels are {labels.dtype}; expected integers")
    # Compared in their own type: in another, 2^32 + 1 could be 1.
    bad = (labels < 0) | (labels >= MOST_CLASSES)
    if bad.any():
        raise DataError(
            f"{where}: label {labels[bad][0]} of example {int(bad.argmax())}; expected classes "
            f"from 0 to {MOST_CLASSES - 1}"
        )
    return labels.astype(np.int32)


def _checked(splits: Mapping[str, Split]) -> Mapping[str, Split]:
    """Returns splits that fit together; raises DataError for others."""
    (first, (inputs, labels)), *others = splits.items()
    for name, (more, classes) in others:
        if more.shape[1:] != inputs.shape[1:] or more.dtype != inputs.dtype:
            raise DataError(
                f"inputs of {name} are {more.dtype} {more.shape[1:]}, "
                f"of {first} {inputs.dtype} {inputs.shape[1:]}"
            )
        if _is_real(classes) != _is_real(labels) or classes.shape[1:] != labels.shape[1:]:
            raise DataError(
                f"labels of {name} are {classes.dtype} {classes.shape}, of {first} "
                f"{labels.dtype} {labels.shape}"
            )
        if not _is_real(labels) and classes.max() > labels.max():
            raise DataError(
                f"{name} has label {classes.max()}, {first} only those up to {labels.max()}"
            )
    return splits
