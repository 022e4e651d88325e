"""A teacher's outputs on disk, which are refused rather than used for what they were not made for.

A cache is a directory of `records.npy`, one array of records that is mapped into memory, and a
`metadata.json` with its format, its key, its length, and the size and SHA-256 of the array's file.
It is written next to its final name and renamed when complete: under the final name there is a
whole cache or nothing.

A record is the example's id (int32), then by kind "logits" float32 [classes]; or "indices" int32
[k] and "log_probs" float32 [k]; or "indices" int32 [samples] and "weights" float32 [samples], all
little-endian and packed. The index of a record is an example's id if the teacher sees every image
as it is; if it sees augmented images, other ones each epoch, the index is the position in the
training stream (see `kdq.data.train_dataset`).
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import ArrayLike

from kdq import files
from kdq.data import DataError
from kdq.distill.cache_key import CacheKey

FORMAT = 2
_METADATA, _RECORDS, _LOCK = "metadata.json", "records.npy", "lock"
_LOGARITHMS = ("logits", "log_probs")  # where −inf is a probability of 0


class CacheError(DataError):
    """A cache that is missing, damaged or of something else; the message says which."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Cache:
    """An open cache; indices are 0 .. len(cache) - 1. Threads may read it at the same time."""

    directory: Path
    key: CacheKey
    records: np.ndarray = dataclasses.field(repr=False)  # [length], mapped into memory
    version: tuple[int, int] = dataclasses.field(repr=False)  # see `_version`

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: ArrayLike, ids: ArrayLike | None = None) -> dict[str, np.ndarray]:
        """Reads records by index: "id" int32 [b] and the arrays of the kind, [b, ...], in order.

        Indices [b] int are example ids, or positions in the stream if `key.by_position`. `ids` [b]
        are what the caller has there, such as a training batch's "id"; they may be left out where
        the indices are the ids. CacheError for another example than that, or a file that has
        changed; IndexError and ValueError for indices out of range and ids that are missing.
        """
        indices = np.asarray(indices)
        if ids is None:
            if self.key.by_position:
                raise ValueError(f"{self.directory} is indexed by position: ids must be given")
            ids = indices
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(
                f"{self.directory}: indices from {indices.min()} to {indices.max()} asked for, "
                f"valid are 0 to {len(self) - 1}"
            )
        ids = np.asarray(ids)
        if ids.shape != indices.shape:
            raise ValueError(f"ids {ids.shape} must be one for each of the indices {indices.shape}")
        self._check_unchanged()
        rows = self.records[indices]
        wrong = np.flatnonzero(rows["id"] != ids)
        if wrong.size:
            first = wrong[0]
            raise CacheError(
                f"{self.directory}: record {indices[first]} is of example {rows['id'][first]}, "
                f"not of {ids[first]}"
            )
        return _columns(rows)

    def load(self, limit_bytes: int = 2 * 2**30) -> dict[str, np.ndarray]:
        """Reads everything: "id" int32 [length] and the arrays of the kind, [length, ...].

        Without augmentation row i is example i's, so that an array can be `extra` of
        `kdq.data.train_dataset`. By position, it is for the caller to compare "id". Raises
        CacheError for more than `limit_bytes`, or a file that has changed.
        """
        if self.records.nbytes > limit_bytes:
            raise CacheError(
                f"{self.directory} takes {self.records.nbytes} bytes in memory, the limit is "
                f"{limit_bytes}; raise it or read batches"
            )
        self._check_unchanged()
        return _columns(self.records)

    def _check_unchanged(self) -> None:
        """Raises CacheError for a changed file: to read pages that are gone ends the process."""
        path = self.directory / _RECORDS
        with contextlib.suppress(OSError):
            if _version(path) == self.version:
                return
        raise CacheError(f"{path} has changed since it was opened")


def _columns(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: rows[name].copy() for name in rows.dtype.names}


def _version(path: Path) -> tuple[int, int]:
    """Returns a file's size and time of change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def open_cache(directory: str | Path, key: CacheKey) -> Cache:
    """Opens a cache after checking that it is whole and is that of `key`; reads every byte once.

    Raises CacheError for no cache, another format, another key (every field that differs is named),
    or a file that is missing, truncated or damaged.
    """
    directory = Path(directory)
    path = directory / _METADATA
    parts = None
    try:
        metadata = files.read_json(path)
        if metadata["format"] == FORMAT:
            parts = dict(metadata["key"]), *(metadata[k] for k in ("length", "bytes", "sha256"))
    except FileNotFoundError as error:
        raise CacheError(f"no cache in {directory}: there is no {_METADATA}") from error
    except files.DamagedError as error:
        raise CacheError(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged: {error!r}") from error
    if parts is None:
        raise CacheError(
            f"{directory} has format {metadata['format']!r}; this version reads {FORMAT}: delete it"
        )
    stored, length, size, expected_sha = parts
    expected = key.to_json()
    differences = [
        f"{name}: expected {expected.get(name, 'nothing')!r}, found {stored.get(name, 'nothing')!r}"
        for name in sorted(expected | stored)
        if name not in expected or name not in stored or expected[name] != stored[name]
    ]
    if differences:
        raise CacheError(f"{directory} is a cache of something else: {'; '.join(differences)}")
    path = directory / _RECORDS
    if not path.exists():
        raise CacheError(f"{path} is missing")
    version = _version(path)
    if version[0] != size:
        raise CacheError(f"{path} has {version[0]} bytes, not {size}")
    with open(path, "rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    if sha != expected_sha:
        raise CacheError(f"{path} is damaged: its SHA-256 is not the one of {_METADATA}")
    records = np.load(path, mmap_mode="r").view(np.ndarray)
    if records.dtype != key.record or records.shape != (length,):
        raise CacheError(f"{directory / _METADATA} is damaged: its length is not {records.shape}")
    return Cache(directory=directory, key=key, records=records, version=version)


def write_cache(
    directory: str | Path,
    key: CacheKey,
    batches: Iterable[Mapping[str, ArrayLike]],
    length: int,
) -> Cache:
    """Writes a cache and opens it, or opens the one that is there if key and length are these.

    Args:
      directory: final name; its parents are made. What a killed writer left beside it is removed.
      key: what the batches were made from.
      batches: of `make_records`, in the order of the index from 0 on. Not touched where the cache
        exists, or once another process that is writing it has finished. By position they may go on
        for ever, the last one is cut.
      length: number of records: the split's size, or the number of positions.

    Raises:
      CacheError: batches out of order, of another layout or number, with a value that is not finite
        or an index that is no class; a directory that holds something else.
    """
    directory = Path(directory)
    if length < 1:
        raise ValueError(f"expected a length of at least 1, got {length}")
    if directory.exists():
        return _open_existing(directory, key, length)
    partial = directory.with_name(f".{directory.name}.partial")
    with _lock(partial):
        if directory.exists():  # it was finished since we looked
            shutil.rmtree(partial, ignore_errors=True)
            return _open_existing(directory, key, length)
        try:
            _write(partial, key, batches, length)
            partial.rename(directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (directory / _LOCK).unlink()  # not earlier: another writer would find the way free
    return open_cache(directory, key)


def _lock(partial: Path) -> TextIO:
    """Makes a folder that is this process's alone until it closes the lock, or ends.

    Waits for another one that writes there.
    """
    path = partial / _LOCK
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        # The folder is gone if the other one has finished meanwhile, or given up.
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as closed_again:
            lock = closed_again.enter_context(open(path, "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                closed_again.pop_all()
                return lock


def _open_existing(directory: Path, key: CacheKey, length: int) -> Cache:
    try:
        cache = open_cache(directory, key)
        if len(cache) != length:
            raise CacheError(f"{directory}: length: expected {length}, found {len(cache)}")
    except CacheError as error:
        raise CacheError(f"{error}. It is in the way: remove it or write elsewhere") from error
    return cache


def _write(
    partial: Path, key: CacheKey, batches: Iterable[Mapping[str, ArrayLike]], length: int
) -> None:
    for stale in set(partial.iterdir()) - {partial / _LOCK}:
        stale.unlink()
    path = partial / _RECORDS
    header = {
        "descr": np.lib.format.dtype_to_descr(key.record),
        "fortran_order": False,
        "shape": (length,),
    }
    # Not by a map: a write to one where the disk is full ends the process.
    with open(path, "w+b") as file:
        np.lib.format.write_array_header_1_0(file, header)
        done = 0
        for batch in batches:
            rows = _make_rows(key, batch, done)
            done += len(rows)
            if done > length and not key.by_position:
                raise CacheError(f"the batches have {done} examples or more, length is {length}")
            file.write(rows[: len(rows) - max(done - length, 0)].tobytes())
            if done >= length and key.by_position:
                break  # the stream has no end
        if done < length:
            raise CacheError(f"the batches have {done} examples, length is {length}")
        file.seek(0)
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    metadata = {
        "format": FORMAT,
        "key": key.to_json(),
        "length": length,
        "bytes": path.stat().st_size,
        "sha256": sha,
    }
    files.write_json(partial / _METADATA, metadata)


def _make_rows(key: CacheKey, batch: Mapping[str, ArrayLike], first: int) -> np.ndarray:
    """Returns a batch as records; `first` is the index that its first row must have."""
    index = "position" if key.by_position else "id"
    names = {*key.record.names, index}
    if set(batch) != names:
        raise CacheError(f"a batch has the arrays {sorted(batch)}, must have {sorted(names)}")
    arrays = {name: np.asarray(array) for name, array in batch.items()}
    expected = np.arange(first, first + len(arrays[index]))
    if not np.array_equal(arrays[index], expected):
        raise CacheError(f"{index} {arrays[index]} must go on from {first} without a gap")
    rows = np.empty(len(expected), key.record)
    for name in key.record.names:
        array, place = arrays[name], rows[name]
        integer = name == "id" and np.can_cast(array.dtype, np.int32, "same_kind")
        integer = integer and bool((array == array.astype(np.int32)).all())  # none wraps
        if array.shape != place.shape or not (integer or array.dtype == place.dtype):
            raise CacheError(
                f"{name} is {array.dtype} {array.shape}, must be {place.dtype} {place.shape}"
            )
        finite = np.isfinite(array)
        if name in _LOGARITHMS:  # −inf is a class that the teacher rules out, but never all of them
            finite = (finite | np.isneginf(array)) & finite.any(-1, keepdims=True)
        if not finite.all():
            raise CacheError(f"{name} is not finite, in the batch from {index} {first} on")
        place[...] = array
    if "indices" in arrays:
        indices = arrays["indices"]
        if not ((indices >= 0) & (indices < key.num_classes)).all():
            raise CacheError(f"indices must be in [0, {key.num_classes})")
    return rows
