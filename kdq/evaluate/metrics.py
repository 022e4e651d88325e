"""Outputs and labels of a whole split, on the host."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from kdq.train.sharding import whole
from kdq.types import Array, Batch


def correct(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Returns whether the largest logit is the label's; never where a logit is NaN.

    Args:
      logits: [batch, classes] float.
      labels: [batch] int in [0, classes).

    Returns:
      [batch] bool.

    Raises:
      ValueError: a label that is no class.
    """
    logits = np.asarray(logits)
    # argmax takes a NaN for the maximum: a diverged model would score as if it had guessed.
    valid = ~np.isnan(logits).any(-1)
    return valid & (logits.argmax(-1) == class_labels(logits, labels))


def predict(outputs: Callable[[Batch], Array], batches: Iterable[Batch]) -> np.ndarray:
    """Computes outputs of every example that no mask hides, in order: [examples, ...] float32.

    Args:
      outputs: of a batch, compiled by the caller.
      batches: evaluation batches.

    Raises:
      ValueError: no batches.
    """
    computed, previous = [], None
    for batch in itertools.chain(batches, [None]):
        current = None if batch is None else (outputs(batch), batch)
        if previous is not None:  # one batch behind the device
            computed.append(_unmasked(*previous))
        previous = current
    if not computed:
        raise ValueError("predict: there are no batches")
    return np.concatenate(computed)


def class_labels(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """The labels as an array, after checking that they are classes of the logits' examples.

    Args:
      logits: [batch, classes] float.
      labels: [batch] int in [0, classes).

    Returns:
      [batch] int.

    Raises:
      ValueError: other shapes, labels that are no integers, or a label that is no class.
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
      fn: slices of the arrays, [batch_size, ...] each -> a tree of arrays [batch_size, ...]; an
        example's result must not depend on the others, as the last slice is padded with copies
        of the last example.
      *arrays: [examples, ...] each.
      batch_size: examples a call, fewer if there are not so many.

    Returns:
      The tree of `fn` as NumPy arrays [examples, ...].

    Raises:
      ValueError: no example, arrays of different lengths, or a batch size below 1.
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


def _unmasked(outputs: Array, batch: Batch) -> np.ndarray:
    outputs = np.asarray(whole(outputs), np.float32)
    return outputs[np.asarray(batch["mask"]) > 0] if "mask" in batch else outputs
