"""The offset of withheld classes, against a search over all offsets."""

import numpy as np
import pytest

from kdq.evaluate.prior import class_offset


def _accuracy(logits, labels, classes, offset):
    raised = logits.copy()
    raised[:, list(classes)] += offset
    return (raised.argmax(1) == labels).mean()


@pytest.mark.parametrize("classes", [(2,), (0, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_no_offset_is_better(classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 60)
    logits = rng.normal(size=(60, 5)) + 2 * np.eye(5)[labels]
    logits[:, list(classes)] -= 3.3
    offset = class_offset(logits, labels, classes)
    best = max(_accuracy(logits, labels, classes, b) for b in np.linspace(-10, 10, 4001))
    assert _accuracy(logits, labels, classes, offset) >= best
    assert best > _accuracy(logits, labels, classes, 0.0)
    assert 1 < offset < 6


def test_what_is_right_already_stays():
    labels = np.arange(4)
    assert class_offset(5 * np.eye(4), labels, (1,)) == 0.0


@pytest.mark.parametrize("classes", [(), (0, 1, 2), (3,), (-1,)])
def test_classes_that_make_no_sense_are_refused(classes):
    with pytest.raises(ValueError, match="want some of 0 to 2, not all"):
        class_offset(np.zeros((2, 3)), [0, 1], classes)
