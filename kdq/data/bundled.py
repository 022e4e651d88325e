"""Data sets of other tasks than images' classes, made of what scikit-learn bundles: no download.

This module is imported only when one of them is used: scikit-learn takes seconds to import.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from sklearn import datasets

from kdq.data.digits import split_ids
from kdq.data.errors import DataError
from kdq.fields import unknown

SPLITS = ("train", "validation", "test")
SEED = 20261130  # of the splits and of the pairs; NumPy keeps RandomState as it is
PAIRS = {"train": 4096, "validation": 1024, "test": 1024}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """One split in memory."""

    inputs: np.ndarray  # [n, ...] uint8, or float32 standardized by the training split
    labels: np.ndarray  # [n, outputs] float32
    # "class_names" of labels; "target_names" and "unit" of targets ("" where units differ).
    facts: Mapping[str, Any]


def read_bundled(name: str, split: str) -> Examples:
    """Reads a split of a bundled data set.

    Args:
      name: "diabetes", "linnerud" or "digit_pairs".
      split: "train", "validation" or "test", always the same 60/20/20 % of the examples; of
        digit_pairs those of `digits`, so that no handwritten digit is in two splits.

    Raises:
      DataError: another name or split.
    """
    if name not in BUNDLED:
        raise DataError(unknown("bundled data set:", name, BUNDLED))
    if split not in SPLITS:
        raise DataError(unknown(f"split of {name}:", split, SPLITS))
    return BUNDLED[name](split)


def read_diabetes(split: str) -> Examples:
    """Reads 442 patients: 10 measurements, and the progression of the disease after a year."""
    data = datasets.load_diabetes(scaled=False)
    facts = {"target_names": ("progression",), "unit": ""}
    return _split_table(data.data, data.target[:, None], split, facts)


def read_linnerud(split: str) -> Examples:
    """Reads 20 men of a fitness club: chin-ups, sit-ups, jumps, and three physiological targets."""
    data = datasets.load_linnerud()
    facts = {"target_names": ("weight", "waist", "pulse"), "unit": ""}
    return _split_table(data.data, data.target, split, facts)


def read_digit_pairs(split: str) -> Examples:
    """Composes images of two digits side by side, 8×16×1 uint8 with values 0 to 16.

    Labels are [n, 10] float32: which of the ten digits are there, one or two of them.
    """
    digits, ids = datasets.load_digits(), split_ids()[split]
    rng = np.random.RandomState([SEED, SPLITS.index(split)])
    pairs = ids[rng.randint(len(ids), size=(PAIRS[split], 2))]
    images = digits.images.astype(np.uint8)[pairs]  # [n, 2, 8, 8]
    labels = np.eye(10, dtype=np.float32)[digits.target[pairs]].max(1)
    inputs = images.swapaxes(1, 2).reshape(len(pairs), 8, 16, 1)
    return Examples(inputs=inputs, labels=labels, facts={"class_names": tuple("0123456789")})


def _split_table(
    inputs: np.ndarray, targets: np.ndarray, split: str, facts: Mapping[str, Any]
) -> Examples:
    """Returns a split of a table, its columns standardized by the training split alone."""
    order = np.random.RandomState(SEED).permutation(len(inputs))
    ends = np.round(np.array([0.6, 0.8]) * len(inputs)).astype(int)
    rows = dict(zip(SPLITS, np.split(order, ends), strict=True))
    train = inputs[rows["train"]]
    inputs = (inputs[rows[split]] - train.mean(0)) / train.std(0)
    return Examples(
        inputs=inputs.astype(np.float32),
        labels=targets[rows[split]].astype(np.float32),
        facts=facts,
    )


BUNDLED: Mapping[str, Callable[[str], Examples]] = {
    "diabetes": read_diabetes,
    "linnerud": read_linnerud,
    "digit_pairs": read_digit_pairs,
}
