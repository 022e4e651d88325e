"""What a classifier that never saw some classes knows of them, once its bias is put right."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from kdq.evaluate import metrics


def class_offset(logits: ArrayLike, labels: ArrayLike, classes: Sequence[int]) -> float:
    """The number that, added to the logits of `classes`, makes the most predictions right.

    A student that is distilled without any example of a class has learned a bias that is much too
    low for it, but may know its shape (Hinton et al., 2015, arXiv:1503.02531, §3, who choose the
    offset on test; choose it on validation). Of equally good offsets, the middle of the widest
    interval; 0 if nothing is better.

    Args:
      logits: [batch, classes] float.
      labels: [batch] int.
      classes: those to raise; some, not all.

    Raises:
      ValueError: no or every class given, one that does not exist, or labels that do not fit.
    """
    logits = np.asarray(logits, np.float64)
    labels = metrics.class_labels(logits, labels)
    raised = np.zeros(logits.shape[1], bool)
    if not set(classes) <= set(range(len(raised))) or not 0 < len(set(classes)) < len(raised):
        raise ValueError(f"classes={tuple(classes)}: want some of 0 to {len(raised) - 1}, not all")
    raised[list(classes)] = True
    inner = np.where(raised, logits, -np.inf)
    outer = np.where(raised, -np.inf, logits)
    threshold = outer.max(1) - inner.max(1)  # beyond it one of `classes` is predicted
    gained = (inner.argmax(1) == labels).astype(int) - (outer.argmax(1) == labels)
    # After the k smallest thresholds are passed, right[k] more are right than with none passed.
    order = np.argsort(threshold)
    edges, right = threshold[order], np.concatenate([[0], np.cumsum(gained[order])])
    ends = np.concatenate([[edges[0] - 1], edges, [edges[-1] + 1]])
    widths = np.diff(ends)
    now = right[np.searchsorted(edges, 0.0, side="left")]
    best = right[widths > 0].max()
    if best <= now:
        return 0.0
    k = int(np.argmax(np.where(right == best, widths, -1.0)))
    return float((ends[k] + ends[k + 1]) / 2)
