"""Data sets of other tasks than images' classes, made of what scikit-learn bundles: no download.

This module is imported only when one of them is used: scikit-learn takes seconds to import.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from sklearn import datasets

from kdq.data.source import DataError, Source, hold_arrays
from kdq.data.sources.digits import split_ids
from kdq.fields import unknown

SPLITS = ("train", "validation", "test")
SEED = 20261130  # of the splits and of the pairs; NumPy keeps RandomState as it is
PAIRS = {"train": 4096, "validation": 1024, "test": 1024}

# "image" uint8, or float32 standardized by the training split; "label" [n, outputs] float32; and
# the facts: "class_names" of labels, "target_names" and "unit" of targets ("" where they differ).
Split = tuple[np.ndarray, np.ndarray, Mapping[str, Any]]


def open_bundled(name: str, split: str) -> Source:
    """Opens a split of a bundled data set; raises DataError for another name or split.

    Splits are always the same 60/20/20 % of the examples; of digit_pairs those of `digits`, so that
    no handwritten digit is in two splits.
    """
    if name not in READERS:
        raise DataError(unknown("bundled data set:", name, READERS))
    if split not in SPLITS:
        raise DataError(unknown(f"split of {name}:", split, SPLITS))
    inputs, labels, facts = READERS[name](split)
    return hold_arrays(
        {"image": inputs, "label": labels}, name=name, version="1.0.0", split=split, facts=facts
    )


def read_digit_pairs(split: str) -> Split:
    """Composes images of two digits side by side, 8×16×1 uint8 with values 0 to 16.

    Labels are [n, 10] float32: which of the ten digits are there, one or two of them.
    """
    digits, ids = datasets.load_digits(), split_ids()[split]
    rng = np.random.RandomState([SEED, SPLITS.index(split)])
    pairs = ids[rng.randint(len(ids), size=(PAIRS[split], 2))]
    images = digits.images.astype(np.uint8)[pairs]  # [n, 2, 8, 8]
    labels = np.eye(10, dtype=np.float32)[digits.target[pairs]].max(1)
    inputs = images.swapaxes(1, 2).reshape(len(pairs), 8, 16, 1)
    return inputs, labels, {"class_names": tuple("0123456789")}


def _read_table(load: Callable[[], Any], names: tuple[str, ...], split: str) -> Split:
    """Reads a split of a table, its columns standardized by the training split alone."""
    data = load()
    inputs, targets = data.data, data.target.reshape(len(data.data), -1)
    order = np.random.RandomState(SEED).permutation(len(inputs))
    ends = np.round(np.array([0.6, 0.8]) * len(inputs)).astype(int)
    rows = dict(zip(SPLITS, np.split(order, ends), strict=True))
    train = inputs[rows["train"]]
    inputs = (inputs[rows[split]] - train.mean(0)) / train.std(0)
    facts = {"target_names": names, "unit": ""}
    return inputs.astype(np.float32), targets[rows[split]].astype(np.float32), facts


READERS: Mapping[str, Callable[[str], Split]] = {
    # 442 patients: 10 measurements, and the progression of the disease after a year.
    "diabetes": partial(
        _read_table, partial(datasets.load_diabetes, scaled=False), ("progression",)
    ),
    # 20 men of a fitness club: chin-ups, sit-ups, jumps, and three physiological targets.
    "linnerud": partial(_read_table, datasets.load_linnerud, ("weight", "waist", "pulse")),
    "digit_pairs": read_digit_pairs,
}
