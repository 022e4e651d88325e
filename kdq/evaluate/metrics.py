"""Outputs and labels of a whole split, on the host."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from kdq.train.sharding import whole
from kdq.types import Array, Batch


def correct(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Returns whether the largest logit is the label's, [batch] bool; never where a logit is NaN.

    Arguments and errors are those of `class_labels`.
    """
    logits = np.asarray(logits)
    # argmax takes a NaN for the maximum: a diverged model would score as if it had guessed.
    valid = ~np.isnan(logits).any(-1)
    return valid & (logits.argmax(-1) == class_labels(logits, labels))


def predict(outputs: Callable[[Batch], Array], batches: Iterable[Batch]) -> np.ndarray:
    """Computes outputs of every example that no mask hides, in order: [examples, ...] float32.

    `outputs` are of a batch, compiled by the caller. ValueError for no batches.
    """
    computed = []
    for outputs_of_batch, batch in one_behind(outputs, batches):
        every = np.asarray(outputs_of_batch, np.float32)
        computed.append(every[np.asarray(batch["mask"]) > 0] if "mask" in batch else every)
    if not computed:
        raise ValueError("predict: there are no batches")
    return np.concatenate(computed)


def one_behind(
    compute: Callable[[Batch], Any], batches: Iterable[Batch]
) -> Iterator[tuple[Any, Batch]]:
    """Yields what is computed of each batch, on the host, while the device is at the next."""
    previous = None
    for batch in itertools.chain(batches, [None]):
        current = None if batch is None else (compute(batch), batch)
        if previous is not None:
            yield jax.tree.map(whole, previous[0]), previous[1]
        previous = current


def class_labels(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Returns labels [batch] int after checking that they are classes of logits [batch, classes].

    ValueError for other shapes, labels that are no integers, or a label that is no class.
    """
    shape, labels = np.shape(logits), np.asarray(labels)
    if len(shape) != 2 or labels.shape != shape[:1]:
        raise ValueError(
            f"logits must be [batch, classes] and labels [batch], given {shape} and {labels.shape}"
        )
    if labels.size and not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, given {labels.dtype}")
    if labels.size and not (labels.min() >= 0 and labels.max() < shape[1]):
        raise ValueError(
            f"labels must be in [0, {shape[1]}), given {labels.min()} to {labels.max()}"
        )
    return labels


def in_batches(fn: Callable[..., Any], *arrays: np.ndarray, batch_size: int) -> Any:
    """Applies a function to slices of one size, so that what it jits compiles once.

    Args:
      fn: slices of the arrays, [batch_size, ...] each -> a tree of arrays [batch_size, ...], which
        become NumPy's [examples, ...]; an example's result must not depend on the others, as the
        last slice is padded with copies of the last example.
      *arrays: [examples, ...] each, as many and at least one: else ValueError.
      batch_size: examples a call, at least 1; fewer if there are not so many.
    """
    examples = {len(array) for array in arrays}
    if len(examples) != 1 or 0 in examples:
        raise ValueError(f"in_batches: lengths must be equal and positive, given {examples}")
    if batch_size < 1:
        raise ValueError(f"in_batches: batch_size must be at least 1, given {batch_size}")
    (n,) = examples
    size = min(batch_size, n)
    parts = []
    for start in range(0, n, size):
        rows = np.minimum(np.arange(start, start + size), n - 1)
        result = fn(*(array[rows] for array in arrays))
        parts.append(jax.tree.map(lambda r, keep=n - start: np.asarray(r)[:keep], result))
    return jax.tree.map(lambda *p: np.concatenate(p), *parts)
