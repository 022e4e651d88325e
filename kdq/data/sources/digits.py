"""`digits`: scikit-learn's bundled 8×8 digits as a TFDS data set with a fixed, recorded split.

This module is imported only when the data set is used: its class needs tensorflow_datasets.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from kdq.data.source import DataError
from kdq.data.sources.writing import write_dataset

SPLIT_SEED = 20240229
# sha256 over the ids (int32, little endian, ascending) of train, validation and test in turn. The
# split comes from scikit-learn's random numbers: this is how a change in them would be noticed.
SPLIT_DIGEST = "8af2e930ed26942e9b27aa2f790438761af86da292f4183ff767b8b5ce5aa225"


def split_ids() -> dict[str, np.ndarray]:
    """Returns the ids, ascending int32, of each split: 60/20/20 %, stratified by class."""
    labels = load_digits().target
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED
    )
    train, validation = train_test_split(
        rest, test_size=0.25, stratify=labels[rest], random_state=SPLIT_SEED
    )
    splits = {"train": train, "validation": validation, "test": test}
    return {name: np.sort(ids).astype("<i4") for name, ids in splits.items()}


def split_digest(splits: dict[str, np.ndarray]) -> str:
    """Returns the sha256, in hex, of the splits' ids in the order train, validation, test."""
    ids = [splits[name] for name in ("train", "validation", "test")]
    return hashlib.sha256(np.concatenate(ids).tobytes()).hexdigest()


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 images of handwritten digits, 8×8×1 uint8 with values 0 to 16, in 10 classes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS declares it so)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The test set of UCI's Optical Recognition of Handwritten Digits, as "
            "bundled with scikit-learn, in a fixed stratified 60/20/20 split.",
            # `Tensor`, not `Image`: TFDS encodes an `Image` with TensorFlow, and 0..16 is no PNG.
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "id": tfds.features.Scalar(dtype=np.int32),  # row in load_digits()
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
            metadata=tfds.core.MetadataDict(split_seed=SPLIT_SEED, split_digest=SPLIT_DIGEST),
        )

    def _split_generators(self, dl_manager) -> dict:
        splits = split_ids()
        if split_digest(splits) != SPLIT_DIGEST:
            raise DataError(
                f"digits: the split made here has digest {split_digest(splits)}, the recorded one "
                f"is {SPLIT_DIGEST}; this scikit-learn splits differently, use another version"
            )
        return {name: self._generate_examples(ids) for name, ids in splits.items()}

    def _generate_examples(self, ids: np.ndarray) -> Iterator[tuple[int, dict]]:
        digits = load_digits()
        images = digits.images.astype(np.uint8)[..., None]
        for index in ids.tolist():
            yield index, {"image": images[index], "label": digits.target[index], "id": index}


def prepare_digits(data_dir: Path) -> Path:
    """Writes `digits` under `data_dir`, in full or not at all, and returns its directory."""
    return write_dataset(lambda scratch: Digits(data_dir=scratch), data_dir)
