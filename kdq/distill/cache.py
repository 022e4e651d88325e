"""A teacher's outputs on disk, which are refused rather than used for what they were not made for.

A cache is a directory of array_record shards and a `metadata.json` with its format, its key, its
length and, for each shard, its number of records, size and SHA-256. It is written next to its final
name and renamed when complete: under the final name there is a whole cache or nothing.

A record has a fixed size. It holds, little-endian and packed: the example's id (int32), then by
kind "logits" float32 [classes]; or "indices" int32 [k] and "log_probs" float32 [k]; or "indices"
int32 [samples] and "weights" float32 [samples]. Record i of shard s has the index
s * records_per_shard + i. The index is an example's id if the teacher sees every image as it is; if
it sees augmented images, other ones each epoch, the index is the position in the training stream
(see `kdq.data.train_dataset`).
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from numpy.typing import ArrayLike

from kdq import files
from kdq.data import DataError
from kdq.distill.cache_key import CacheKey

FORMAT = 1
_METADATA = "metadata.json"
_LOCK = "lock"
# Floats do not compress. Groups of 16 keep the overhead of a record of 10 classes to a fifth.
_WRITER_OPTIONS = "group_size:16,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # what random access wants
_LOAD_CHUNK = 8192  # records a read while loading into memory
_LOGARITHMS = ("logits", "log_probs")  # where −inf is a probability of 0


class CacheError(DataError):
    """A cache that is missing, damaged or of something else; the message says which."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Cache:
    """An open cache; indices are 0 .. len(cache) - 1. Threads may read it at the same time."""

    directory: Path
    key: CacheKey
    length: int
    records_per_shard: int
    readers: Sequence[ArrayRecordReader] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return self.length

    def read(self, indices: ArrayLike, ids: ArrayLike | None = None) -> dict[str, np.ndarray]:
        """Reads records by index, in the order given.

        Args:
          indices: [b] int: example ids, or positions in the stream if `key.by_position`.
          ids: [b] int, the example ids that the caller has there, such as a training batch's "id".
            May be left out where the indices are the ids.

        Returns:
          "id" int32 [b] and the arrays of the kind, [b, ...], the caller's to change.

        Raises:
          IndexError: an index out of range.
          ValueError: no ids for a cache by position, or another number of them.
          CacheError: another example than the caller has, or a shard that cannot be read.
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
        rows = self._rows(indices)
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
        `kdq.data.train_dataset`. By position, it is for the caller to compare "id".

        Raises:
          CacheError: more than `limit_bytes`, or a shard that cannot be read.
        """
        size = len(self) * self.key.record.itemsize
        if size > limit_bytes:
            raise CacheError(
                f"{self.directory} takes {size} bytes in memory, the limit is {limit_bytes}; "
                "raise it or read batches"
            )
        rows = np.empty(len(self), self.key.record)
        for start in range(0, len(self), _LOAD_CHUNK):
            chunk = np.arange(start, min(start + _LOAD_CHUNK, len(self)))
            rows[chunk] = self._rows(chunk)
        return _columns(rows)

    def _rows(self, indices: np.ndarray) -> np.ndarray:
        rows = np.empty(len(indices), self.key.record)
        shards, offsets = np.divmod(indices, self.records_per_shard)
        for shard in np.unique(shards):
            here = shards == shard
            path = self.directory / _shard_name(shard, len(self.readers))
            try:
                records = b"".join(self.readers[shard].read(offsets[here].tolist()))
            except RuntimeError as error:
                raise CacheError(f"{path} has changed since it was opened: {error}") from error
            if len(records) != here.sum() * rows.itemsize:  # array_record may stop without a word
                raise CacheError(f"{path} has changed since it was opened: records are missing")
            rows[here] = np.frombuffer(records, rows.dtype)
        return rows


def write_cache(
    directory: str | Path,
    key: CacheKey,
    batches: Iterable[Mapping[str, ArrayLike]],
    length: int,
    *,
    records_per_shard: int = 65536,
) -> Cache:
    """Writes a cache, or opens the one that is there if its key and length are these.

    Args:
      directory: final name; its parents are made. What a killed writer left beside it is removed.
      key: what the batches were made from.
      batches: of `make_records`, in the order of the index from 0 on. Not touched where the cache
        exists, or once another process that is writing it has finished. By position they may go on
        for ever, the last one is cut.
      length: number of records: the split's size, or the number of positions.
      records_per_shard: records a file.

    Returns:
      The cache, opened.

    Raises:
      CacheError: batches out of order, of another layout or number, with a value that is not finite
        or an index that is no class; a directory that holds something else.
    """
    directory = Path(directory)
    if length < 1 or records_per_shard < 1:
        raise ValueError(f"length {length}, records_per_shard {records_per_shard}: at least 1")
    if directory.exists():
        return _existing(directory, key, length)
    partial = directory.with_name(f".{directory.name}.partial")
    with _locked(partial):
        if directory.exists():  # it was finished since we looked
            shutil.rmtree(partial, ignore_errors=True)
            return _existing(directory, key, length)
        try:
            _write(partial, key, batches, length, records_per_shard)
            partial.rename(directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (directory / _LOCK).unlink()  # not earlier: another writer would find the way free
    return open_cache(directory, key)


def open_cache(directory: str | Path, key: CacheKey) -> Cache:
    """Opens a cache after checking that it is whole and is that of `key`; reads every byte once.

    Raises:
      CacheError: no cache; another format; another key, every field that differs is named; a shard
        that is missing, truncated or damaged.
    """
    directory = Path(directory)
    found, length, shards = _read_metadata(directory)
    expected = key.to_json()
    differences = [
        f"{name}: expected {expected.get(name, 'nothing')!r}, found {found.get(name, 'nothing')!r}"
        for name in sorted(expected | found)
        if name not in expected or name not in found or expected[name] != found[name]
    ]
    if differences:
        raise CacheError(f"{directory} is a cache of something else: {'; '.join(differences)}")
    counts = [shard.records for shard in shards]
    if sum(counts) != length or set(counts[:-1]) - {counts[0]} or counts[-1] > counts[0]:
        raise CacheError(f"{directory / _METADATA} is damaged: {counts} records, {length} in all")
    return Cache(
        directory=directory,
        key=key,
        length=length,
        records_per_shard=counts[0],
        readers=[_open_shard(directory, shard) for shard in shards],
    )


@dataclasses.dataclass(frozen=True)
class _Shard:
    name: str
    records: int
    bytes: int
    sha256: str


def _read_metadata(directory: Path) -> tuple[dict[str, Any], int, list[_Shard]]:
    """Returns key, length and shards as they were written down."""
    path = directory / _METADATA
    try:
        metadata = files.read_json(path)
        version = metadata["format"]
        if version == FORMAT:
            shards = [_Shard(**entry) for entry in metadata["shards"]]
            _check_metadata(metadata["length"], shards)
            return dict(metadata["key"]), metadata["length"], shards
    except FileNotFoundError as error:
        raise CacheError(f"no cache in {directory}: there is no {_METADATA}") from error
    except files.DamagedError as error:
        raise CacheError(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged: {error!r}") from error
    raise CacheError(f"{directory} has format {version!r}; this version reads {FORMAT}")


def _check_metadata(length: Any, shards: Sequence[_Shard]) -> None:
    """Raises ValueError for what `_write` did not write down."""
    counts = [length, *(count for shard in shards for count in (shard.records, shard.bytes))]
    if not shards or any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"counts {counts}")
    for shard in shards:
        if not re.fullmatch(r"[\w.-]+", str(shard.name)):
            raise ValueError(f"a shard is called {shard.name!r}")


def _locked(partial: Path) -> TextIO:
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


def _existing(directory: Path, key: CacheKey, length: int) -> Cache:
    try:
        cache = open_cache(directory, key)
        if len(cache) != length:
            raise CacheError(f"{directory}: length: expected {length}, found {len(cache)}")
    except CacheError as error:
        raise CacheError(f"{error}. It is in the way: remove it or write elsewhere") from error
    return cache


def _write(
    partial: Path,
    key: CacheKey,
    batches: Iterable[Mapping[str, ArrayLike]],
    length: int,
    records_per_shard: int,
) -> None:
    for stale in set(partial.iterdir()) - {partial / _LOCK}:
        stale.unlink()
    records = _records(key, batches, length)
    total = math.ceil(length / records_per_shard)
    shards = [
        _write_shard(
            partial / _shard_name(shard, total), itertools.islice(records, records_per_shard)
        )
        for shard in range(total)
    ]
    next(records, None)  # sees that no batch is left
    metadata = {
        "format": FORMAT,
        "key": key.to_json(),
        "length": length,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    files.write_json(partial / _METADATA, metadata)


def _shard_name(shard: int, total: int) -> str:
    return f"{shard:05}-of-{total:05}.array_record"


def _write_shard(path: Path, records: Iterable[bytes]) -> _Shard:
    count = 0
    with contextlib.closing(ArrayRecordWriter(str(path), _WRITER_OPTIONS)) as writer:
        for count, record in enumerate(records, start=1):  # noqa: B007 (how many there were)
            writer.write(record)
    return _Shard(path.name, count, path.stat().st_size, _sha(path))


def _open_shard(directory: Path, shard: _Shard) -> ArrayRecordReader:
    path = directory / shard.name
    if not path.exists():
        raise CacheError(f"{path} is missing")
    if path.stat().st_size != shard.bytes:
        raise CacheError(f"{path} has {path.stat().st_size} bytes, not {shard.bytes}")
    if _sha(path) != shard.sha256:
        raise CacheError(f"{path} is damaged: its SHA-256 is not the one of {_METADATA}")
    reader = ArrayRecordReader(str(path), _READER_OPTIONS)
    if reader.num_records() != shard.records:
        raise CacheError(f"{path} has {reader.num_records()} records, not {shard.records}")
    return reader


def _records(
    key: CacheKey, batches: Iterable[Mapping[str, ArrayLike]], length: int
) -> Iterator[bytes]:
    """Yields the bytes of exactly `length` records, or says what is wrong with the batches."""
    done = 0
    for batch in batches:
        rows = _batch_rows(key, batch, done)
        done += len(rows)
        if done > length and not key.by_position:
            raise CacheError(f"the batches have {done} examples or more, length is {length}")
        yield from (row.tobytes() for row in rows[: len(rows) - max(done - length, 0)])
        if done >= length and key.by_position:
            return  # the stream has no end
    if done < length:
        raise CacheError(f"the batches have {done} examples, length is {length}")


def _batch_rows(key: CacheKey, batch: Mapping[str, ArrayLike], first: int) -> np.ndarray:
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
    if (
        "indices" in arrays
        and not ((arrays["indices"] >= 0) & (arrays["indices"] < key.num_classes)).all()
    ):
        raise CacheError(f"indices must be in [0, {key.num_classes})")
    return rows


def _columns(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: rows[name].copy() for name in rows.dtype.names}


def _sha(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
