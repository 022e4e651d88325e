"""The bundled data sets: what they hold, and splits that never change."""

import hashlib

import numpy as np
import pytest
from sklearn import datasets

from kdq import tasks
from kdq.data import DataError, open_split
from kdq.data.sources import BUNDLED
from kdq.data.sources.bundled import READERS, SPLITS, open_bundled
from kdq.data.sources.digits import split_ids

# Of inputs' and labels' order: sha256 of the labels of train, validation and test, shortened.
DIGESTS = {
    "diabetes": "06de5b2e104585e2",
    "linnerud": "cae256b7d1dc5d4b",
    "digit_pairs": "2f438d64fc6dda0b",
}


def _read(name, split):
    source = open_split(name, split)
    arrays = source.read(np.arange(len(source)))
    return arrays["image"], arrays["label"]


@pytest.mark.parametrize("name", BUNDLED)
def test_splits_are_the_recorded_ones(name):
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(_read(name, split)[1].astype("<f4").tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize(("name", "count"), [("diabetes", 442), ("linnerud", 20)])
def test_tables_are_those_of_scikit_learn_standardized_by_training(name, count):
    load = getattr(datasets, f"load_{name}")
    data = load(scaled=False) if name == "diabetes" else load()
    splits = [_read(name, split) for split in SPLITS]
    sizes = [len(inputs) for inputs, _ in splits]
    assert sum(sizes) == count
    assert sizes[1:] == pytest.approx([count / 5] * 2, abs=1)
    train = splits[0][0].astype(np.float64)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(0), 1, rtol=1e-5)
    # Each row of the table is in one split, with its target.
    targets = data.target.reshape(count, -1)
    whole = np.concatenate([labels for _, labels in splits])
    order = lambda rows: rows[np.lexsort(rows.T)]
    np.testing.assert_allclose(order(whole), order(targets))
    rows = np.concatenate([inputs for inputs, _ in splits])
    both = [np.concatenate([x, y], axis=1) for x, y in ((rows, whole), (data.data, targets))]
    # Standardizing is a linear map of each column: correlations stay.
    np.testing.assert_allclose(*(np.corrcoef(x.T) for x in both), atol=1e-5)
    assert len(open_split(name, "test").facts["target_names"]) == whole.shape[1]


def test_pairs_are_two_digits_side_by_side_and_no_digit_is_in_two_splits():
    digits = datasets.load_digits()
    places = {image.astype(np.uint8).tobytes(): i for i, image in enumerate(digits.images)}
    ids = split_ids()
    for split in SPLITS:
        inputs, labels = _read("digit_pairs", split)
        assert inputs.shape[1:] == (8, 16, 1)
        assert inputs.dtype == np.uint8
        for image, label in list(zip(inputs, labels, strict=True))[:300]:
            halves = image[:, :8, 0], image[:, 8:, 0]
            pair = [places[np.ascontiguousarray(half).tobytes()] for half in halves]
            assert set(pair) <= set(ids[split].tolist())
            assert set(np.flatnonzero(label)) == set(digits.target[pair])
        shares = labels.mean(0)
        np.testing.assert_allclose(shares, 0.19, atol=0.05)  # 1 - 0.9²


@pytest.mark.parametrize("name", BUNDLED)
def test_they_fit_their_task(name):
    facts, (_, labels) = open_split(name, "train").facts, _read(name, "train")
    task = tasks.build("multilabel" if name == "digit_pairs" else "regression")
    facts = {**facts, **task.target_facts(lambda: labels)}
    task.with_facts(facts).check({"label": labels}, facts)


def test_other_names_are_refused():
    assert tuple(READERS) == BUNDLED
    with pytest.raises(DataError, match=r"unknown bundled data set: 'diabetis' \(did you mean"):
        open_bundled("diabetis", "train")
    with pytest.raises(DataError, match="unknown split of linnerud: 'dev'"):
        open_bundled("linnerud", "dev")
