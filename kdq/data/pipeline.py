"""The Grain pipeline: shuffle, read, transform, prefetch, with a state to checkpoint.

It knows no key of a batch but its own: "id" (index in the split), "mask" and "position".

The element of the pipeline is a whole batch, from its step number on. Grain's own `shuffle` and
`batch` work element by element in Python: about 30 µs an index here, so 500 batches of 64 a second
at most. A stage that handles a batch at a time in NumPy is 10 to 100 times faster, whether the
source is in memory or read record by record, and Grain still gives what it is here for: random
access by step, prefetching threads, an iterator whose state is saved and restored.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import grain
import numpy as np

from kdq.data.source import Source
from kdq.data.transforms import Transforms, random_bits, transform
from kdq.fields import unknown

# Stream positions [b] and example ids [b] to arrays [b, ...] by name.
Lookup = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]

# Handing a batch from thread to thread takes 0.1 ms and competes with the thread that keeps the
# device busy; making a cheap one in that thread is hidden behind the steps under way.
CHEAP_SECONDS = 1e-3

_SHUFFLE = 0  # first part of the shuffle's random key after the seed; transforms have 1, 2, ...


def train_dataset(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transforms: Transforms = MappingProxyType({}),
    ids: np.ndarray | None = None,
    extra: Mapping[str, np.ndarray] = MappingProxyType({}),
    lookup: Lookup | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """Returns the endless training stream; `dataset[step]` is the batch of a step.

    The stream is one permutation of the split after another, a new one each epoch, cut into
    batches: a batch may span two epochs and no example is dropped. It depends on `seed` alone, not
    on how the source is read.

    Args:
      source: the split to train on.
      batch_size: global, over all processes.
      seed: of the order and of random transforms, a nonnegative int.
      transforms: applied in turn to the arrays of a key.
      ids: [n] int, the examples that are used; None is all.
      extra: arrays [len(source), ...] whose rows join the batch by id, such as cached
        "teacher_logits".
      lookup: gives arrays that join the batch by position in the stream, where they depend on how
        an example was augmented.
      process_index: this process's place; it gets rows of its own of each global batch.
      process_count: number of processes; must divide `batch_size`.

    Returns:
      Elements {"id" int32 [b] (index in the split), ...the source's keys, ...extra}, with
      b = batch_size / process_count.

    Raises:
      ValueError: a batch size, seed, process, key or extra array that does not fit.
    """
    rows = _process_rows(batch_size, process_index, process_count)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    ids = np.arange(len(source)) if ids is None else np.asarray(ids)
    if ids.size and not (ids.dtype.kind in "iu" and ids.min() >= 0 and ids.max() < len(source)):
        raise ValueError(
            f"ids must be integers from 0 to {len(source) - 1}, those of {source.name} "
            f"{source.split}; got {ids.dtype} {ids.min()} to {ids.max()}"
        )
    ids = ids.astype(np.int32)
    if not len(ids):
        raise ValueError(f"ids: {source.name} {source.split} would have no example left")
    _check_keys(source, transforms, extra)

    def make(step: int) -> dict[str, np.ndarray]:
        first = step * batch_size
        positions = np.arange(first + rows.start, first + rows.stop)
        batch = {"id": ids[_shuffled(positions, len(ids), seed)]}
        batch |= _read(source, batch["id"], extra)
        if lookup is not None:
            batch |= lookup(positions, batch["id"])
        return transform(batch, transforms, positions=positions, seed=seed)

    return grain.MapDataset.range(sys.maxsize // batch_size).map(make)


def iterate(
    dataset: grain.MapDataset,
    *,
    start_step: int = 0,
    state: dict[str, Any] | None = None,
    num_threads: int | None = None,
    prefetch: int = 16,
) -> grain.DatasetIterator:
    """Iterates over a dataset from a step, or from a saved state, with batches prefetched.

    Args:
      dataset: from `train_dataset`.
      start_step: step of the first batch.
      state: what `get_state()` of an earlier iterator returned, JSON-able; instead of `start_step`.
        The next batch is then the one that an unbroken run would have had.
      num_threads: threads that make batches ahead of time; 0 makes each when asked for. None: 2,
        or 0 where a batch is made in less than `CHEAP_SECONDS`.
      prefetch: batches made ahead of time.
    """
    if state is not None and start_step:
        raise ValueError(f"give start_step or state, not both: {start_step}, {state}")
    if num_threads is None:
        taken = []
        for step in (0, 0, 1):  # the first makes the parts that batches share
            start = time.perf_counter()
            dataset[step]
            taken.append(time.perf_counter() - start)
        num_threads = 0 if min(taken) < CHEAP_SECONDS else 2
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    iterator = iter(dataset.to_iter_dataset(options))
    if state is not None:
        iterator.set_state(state)
    else:
        grain.experimental.set_next_index(iterator, start_step)
    return iterator


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    transforms: Transforms = MappingProxyType({}),
    extra: Mapping[str, np.ndarray] = MappingProxyType({}),
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> "EvalBatches":
    """Returns a split in order as batches of one shape, the last padded with example 0.

    Arguments and elements are those of `train_dataset`; each batch also has "mask" float32 [b],
    1 on examples and 0 on padding. With a limit only so many first examples count.

    Raises:
      ValueError: as `train_dataset`; or a transform that is random.
    """
    rows = _process_rows(batch_size, process_index, process_count)
    _check_keys(source, transforms, extra)
    if random := [step for steps in transforms.values() for step in steps if step.draws]:
        raise ValueError(f"batches to evaluate are transformed at random by {random[0]}")
    count = len(source) if limit is None else min(limit, len(source))
    return EvalBatches(source, count, batch_size, rows, transforms, extra)


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches(Sequence):
    """The batches of one evaluation, made when asked for; can be walked many times."""

    source: Source
    examples: int
    batch_size: int
    rows: range  # of each batch, this process's
    transforms: Transforms
    extra: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        first = index * self.batch_size
        positions = np.arange(first + self.rows.start, first + self.rows.stop)
        counts = positions < self.examples
        ids = np.where(counts, positions, 0).astype(np.int32)
        batch = {"id": ids, **_read(self.source, ids, self.extra)}
        batch = transform(batch, self.transforms, positions=positions, seed=0)
        return {**batch, "mask": counts.astype(np.float32)}


def _read(
    source: Source, ids: np.ndarray, extra: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {**source.read(ids), **{name: array[ids] for name, array in extra.items()}}


def _shuffled(positions: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Maps consecutive stream positions [n] to ids int32 [n], through each epoch's permutation."""
    epochs, offsets = np.divmod(positions, length)
    ids = np.empty(len(positions), np.int32)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        rows = epochs == epoch
        ids[rows] = _permutation(length, seed, epoch)[offsets[rows]]
    return ids


@functools.lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """Returns an epoch's order, int32 [length]: the sort of hashes, the same in every NumPy."""
    keys = random_bits((seed, _SHUFFLE, epoch), np.arange(length))
    return np.argsort(keys, kind="stable").astype(np.int32)


def _process_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """Returns the rows of each global batch that belong to a process."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in [0, {process_count}), got {process_index}")
    if batch_size % process_count:
        raise ValueError(
            f"batch_size (global) must be a multiple of the {process_count} processes, "
            f"got {batch_size}"
        )
    size = batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def _check_keys(source: Source, transforms: Transforms, extra: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for a key that nothing has, or that is taken; and for missing rows."""
    for key in transforms:
        if key not in source.spec:
            raise ValueError(unknown(f"key of {source.name} in transforms:", key, source.spec))
    reserved = {*source.spec, "id", "mask", "position"}
    for name, array in extra.items():
        if name in reserved:
            raise ValueError(f"extra[{name!r}]: the name is taken; reserved: {sorted(reserved)}")
        if len(array) != len(source):
            raise ValueError(
                f"extra[{name!r}] has {len(array)} rows; {source.name} {source.split} has "
                f"{len(source)} examples"
            )
