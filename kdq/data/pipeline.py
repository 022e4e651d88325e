"""The Grain pipeline: shuffle, read, augment, normalize, prefetch, with a state to checkpoint.

The element of the pipeline is a whole batch, from its step number on. Grain's own `shuffle` and
`batch` work element by element in Python: about 30 µs an index here, so 500 batches of 64 a second
at most. A stage that handles a batch at a time in NumPy is 10 to 100 times faster, whether the
source is in memory or read record by record, and Grain still gives what it is here for: random
access by step, prefetching threads, an iterator whose state is saved and restored.
"""

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from kdq.data.source import Source
from kdq.data.transforms import Augmentation, Normalize, random_bits
from kdq.data.transforms import augment as apply_augmentations

# Stream positions [b] and example ids [b] to arrays [b, ...] by name.
Lookup = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]

# To hand a batch from thread to thread takes 0.1 ms, and takes turns with the thread that keeps the
# device busy; making a cheap one there is hidden behind the steps that are under way.
CHEAP_SECONDS = 1e-3

_SHUFFLE = 0  # first part of the shuffle's random key after the seed; augmentations have 1, 2, ...


def train_dataset(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    augment: Sequence[Augmentation] = (),
    ids: np.ndarray | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
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
      seed: of the order and of the augmentations, a nonnegative int.
      mean: subtracted from the pixels; in units of the stored pixel.
      std: divides the pixels; in units of the stored pixel.
      augment: applied in turn to the uint8 images.
      ids: [n] int, the examples that are used; None is all.
      extra: arrays [len(source), ...] whose rows join the batch by id, such as cached
        "teacher_logits".
      lookup: gives arrays that join the batch by position in the stream, where they depend on how
        an example was augmented.
      process_index: this process's place; it gets rows of its own of each global batch.
      process_count: number of processes; must divide `batch_size`.

    Returns:
      Elements {"image" float32 [b, height, width, channels], "label" int32 [b], "id" int32 [b]
      (index in the split), ...extra}, with b = batch_size / process_count.

    Raises:
      ValueError: a batch size, seed, process or extra array that does not fit.
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
    extra = _checked_extra(extra, source)
    normalize = Normalize(mean, std)

    def locate(step: int) -> dict[str, np.ndarray]:
        first = step * batch_size
        positions = np.arange(first + rows.start, first + rows.stop)
        return {"position": positions, "id": ids[_shuffled(positions, len(ids), seed)]}

    def load(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = lookup(batch["position"], batch["id"]) if lookup else {}
        return {**batch, **_read(source, batch["id"], extra), **found}

    def finish(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = apply_augmentations(
            batch["image"], batch.pop("position"), seed=seed, augmentations=augment
        )
        return {**batch, "image": normalize(images)}

    return grain.MapDataset.range(sys.maxsize // batch_size).map(locate).map(load).map(finish)


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
      num_threads: threads that make batches ahead of time; 0 makes each when asked for. None: 2,
        or 0 where a batch is made in less than `CHEAP_SECONDS`.
      prefetch: batches made ahead of time.

    Returns:
      An iterator with `get_state()` and `set_state(state)`: after a restore, the next batch is the
      one that an unbroken run would have had.
    """
    if state is not None and start_step:
        raise ValueError(f"give start_step or state, not both: {start_step}, {state}")
    if num_threads is None:
        num_threads = 0 if _seconds(dataset) < CHEAP_SECONDS else 2
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    iterator = iter(dataset.to_iter_dataset(options))
    if state is not None:
        iterator.set_state(state)
    else:
        grain.experimental.set_next_index(iterator, start_step)
    return iterator


def _seconds(dataset: grain.MapDataset) -> float:
    """What one batch takes, once what is shared by batches has been made."""
    taken = []
    for step in (0, 0, 1):
        start = time.perf_counter()
        dataset[step]
        taken.append(time.perf_counter() - start)
    return min(taken)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    extra: Mapping[str, np.ndarray] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> "EvalBatches":
    """Returns a split in order as batches of one shape, the last padded with example 0.

    Arguments and elements are those of `train_dataset`; each batch also has "mask" float32 [b],
    1 on examples and 0 on padding.
    """
    rows = _process_rows(batch_size, process_index, process_count)
    return EvalBatches(
        source, batch_size, rows, Normalize(mean, std), _checked_extra(extra, source)
    )


class EvalBatches(Sequence):
    """The batches of one evaluation, made when asked for; can be walked many times."""

    def __init__(
        self,
        source: Source,
        batch_size: int,
        rows: range,
        normalize: Normalize,
        extra: Mapping[str, np.ndarray],
    ) -> None:
        self._source, self._batch_size, self._rows = source, batch_size, rows
        self._normalize, self._extra = normalize, extra

    def __len__(self) -> int:
        return math.ceil(len(self._source) / self._batch_size)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        first = index * self._batch_size
        positions = np.arange(first + self._rows.start, first + self._rows.stop)
        real = positions < len(self._source)
        ids = np.where(real, positions, 0).astype(np.int32)
        batch = {"id": ids, **_read(self._source, ids, self._extra)}
        return {
            **batch,
            "image": self._normalize(batch["image"]),
            "mask": real.astype(np.float32),
        }

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[index] for index in range(len(self)))


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


def _checked_extra(
    extra: Mapping[str, np.ndarray] | None, source: Source
) -> Mapping[str, np.ndarray]:
    reserved = {"image", "label", "id", "mask", "position"}
    for name, array in (extra or {}).items():
        if name in reserved:
            raise ValueError(f"extra[{name!r}]: the name is taken; reserved: {sorted(reserved)}")
        if len(array) != len(source):
            raise ValueError(
                f"extra[{name!r}] has {len(array)} rows; {source.name} {source.split} has "
                f"{len(source)} examples"
            )
    return dict(extra or {})
