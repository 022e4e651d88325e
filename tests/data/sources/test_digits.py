"""The `digits` builder: contents, and its fixed stratified split."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from kdq.data import DataError, open_split
from kdq.data.sources import digits as digits_module


def test_split_is_disjoint_complete_and_stratified():
    splits = digits_module.split_ids()
    assert {name: len(ids) for name, ids in splits.items()} == {
        "train": 1077,
        "validation": 360,
        "test": 360,
    }
    np.testing.assert_array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(1797))
    labels = load_digits().target
    shares = np.bincount(labels) / len(labels)
    for ids in splits.values():
        counts = np.bincount(labels[ids], minlength=10)
        assert np.abs(counts - shares * len(ids)).max() <= 1.5


def test_split_digest_is_recorded_in_what_is_written(digits, digits_dir):
    digest = digits_module.split_digest(digits_module.split_ids())
    assert digest == digits_module.SPLIT_DIGEST
    info = tfds.builder("digits", data_dir=digits_dir).info
    assert info.metadata["split_digest"] == digest


def test_a_split_that_changed_is_refused_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_module, "SPLIT_SEED", digits_module.SPLIT_SEED + 1)
    with pytest.raises(DataError, match="digest"):
        open_split("digits", "train", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_writers_keeps_what_the_first_wrote(tmp_path):
    directory = digits_module.prepare_digits(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert digits_module.prepare_digits(tmp_path) == directory
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_images_are_those_of_scikit_learn(digits, digits_dir):
    original, ids = load_digits(), digits_module.split_ids()["validation"]
    plain = tfds.data_source("digits", split="validation", data_dir=digits_dir, download=False)
    assert sorted(int(example["id"]) for example in plain) == ids.tolist()
    batch = digits.read(np.arange(len(digits)))
    for row, example in enumerate(plain):
        index = int(example["id"])
        np.testing.assert_array_equal(batch["image"][row, ..., 0], original.images[index])
        assert batch["label"][row] == original.target[index]
