"""Data sets of one's own in .npz files: what is kept, what is refused, what a run makes of them."""

import numpy as np
import pytest

from kdq import config, data
from kdq.data import DataError, open_split, save_arrays
from kdq.experiment import plan

RNG = np.random.default_rng(0)


def split(n, shape=(3,), dtype=np.float32, classes=4):
    inputs = RNG.normal(size=(n, *shape))
    inputs = inputs.astype(dtype) if dtype != np.uint8 else RNG.integers(0, 256, (n, *shape), dtype)
    return inputs, np.arange(n) % classes


SPLITS = {"train": split(12), "validation": split(5), "test": split(8)}


@pytest.mark.parametrize(
    ("given", "kept", "images"),
    [(np.float64, "float32", False), (np.float16, "float32", False), (np.uint8, "uint8", True)],
)
def test_arrays_come_back_by_id(tmp_path, given, kept, images):
    splits = {name: split(n, (4, 4, 1), given) for name, n in (("train", 9), ("test", 6))}
    save_arrays(tmp_path / "mine.npz", **splits)
    source = open_split("mine.npz", "test", data_dir=tmp_path)
    inputs, labels = splits["test"]
    ids = np.array([5, 0, 3])
    read = source.read(ids)
    assert read["image"].dtype == source.spec["image"].dtype == kept
    assert read["label"].dtype == np.int32
    np.testing.assert_array_equal(read["image"], inputs[ids].astype(kept))
    np.testing.assert_array_equal(read["label"], labels[ids])
    assert source.facts == {"class_names": tuple("0123")}
    assert (source.spec["image"].shape, source.spec["label"].shape, len(source)) == (
        (4, 4, 1),
        (),
        6,
    )
    read["image"][:] = 0
    np.testing.assert_array_equal(source.read(ids)["image"], inputs[ids].astype(kept))


def test_rows_of_features_go_through_the_pipeline(tmp_path):
    save_arrays(tmp_path / "mine.npz", **SPLITS)
    source = open_split(str(tmp_path / "mine.npz"), "train")
    stream = data.train_dataset(
        source, batch_size=4, seed=0, transforms={"image": (data.Normalize(0.0, 2.0),)}
    )
    seen = np.concatenate([stream[step]["id"] for step in range(3)])
    assert sorted(seen) == list(range(12))
    batch = stream[1]
    np.testing.assert_allclose(batch["image"], SPLITS["train"][0][batch["id"]] / 2, rtol=1e-6)


def test_the_same_arrays_again_are_kept_and_others_refused(tmp_path):
    path = save_arrays(tmp_path / "new" / "mine.npz", **SPLITS)
    written = path.stat().st_mtime_ns
    assert save_arrays(path, **SPLITS) == path
    assert path.stat().st_mtime_ns == written
    changed = SPLITS["test"][0].copy()
    changed[2, 1] += 1
    with pytest.raises(DataError, match=r"holds other arrays \(test_inputs\): choose another"):
        save_arrays(path, **{**SPLITS, "test": (changed, SPLITS["test"][1])})
    assert [p.name for p in path.parent.iterdir()] == ["mine.npz"]


def test_digests_follow_the_contents_and_not_the_place(tmp_path):
    def digests(folder, **splits):
        path = save_arrays(tmp_path / folder / "mine.npz", **splits)
        experiment = config.freeze(
            {
                "seeds": (0,),
                "data": {"name": path.name, "data_dir": str(path.parent)},
                "models": {"net": {"name": "mlp", "num_classes": 4}},
                "arms": {"teacher": {"model": "net", "epochs": 1.0}},
            }
        )
        source = open_split(path.name, "train", data_dir=path.parent)
        return plan.digests(experiment)["teacher"], source.digest

    first = digests("a", **SPLITS)
    assert digests("b", **SPLITS) == first
    labels = SPLITS["train"][1].copy()
    labels[0] = 3
    other = digests("c", **{**SPLITS, "train": (SPLITS["train"][0], labels)})
    assert other[0] != first[0]
    assert other[1] != first[1]


X, Y = SPLITS["train"]
NAN = X.copy()
NAN[7, 1] = np.nan


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((X.astype(np.int64), Y), r"train: inputs are int64 \(12, 3\); expected uint8 or floats"),
        ((X[:, 0], Y), r"train: inputs are float32 \(12,\)"),
        ((X[:0], Y[:0]), r"train: inputs are float32 \(0, 3\)"),
        ((NAN, Y), "train: input 7 is not finite"),
        ((X, Y[:-1] + 0.5), r"labels are float64 \(11,\); expected integers \(12,\)"),
        ((X, np.where(Y == 1, np.nan, Y)), "train: label of example 1 is not finite"),
        ((X, Y + 1e300), "train: label of example 0 is not finite"),
        ((X, np.zeros((12, 2, 2))), r"labels are float64 \(12, 2, 2\)"),
        ((X, np.eye(4, dtype=int)[Y]), r"labels are int64 \(12, 4\)"),
        ((X, Y[:-1]), r"labels are int64 \(11,\); expected integers \(12,\)"),
        ((X, Y - 1), "train: label -1 of example 0; expected classes from 0 to 4194303"),
        # Of 32 bits each is a valid class: 1, 0, -1 and 2^31 - 1.
        ((X, np.where(Y == 1, 2**32 + 1, Y)), "train: label 4294967297 of example 1; expected"),
        ((X, np.where(Y == 2, -(2**32), Y)), "train: label -4294967296 of example 2; expected"),
        ((X, Y.astype(np.uint64) + np.uint64(2**64 - 4)), "label 18446744073709551612 of exampl"),
        ((X, np.where(Y == 3, 2**31 - 1, Y)), "train: label 2147483647 of example 3; expected"),
        ((X, Y + 0.5), r"labels of validation are int32 \(\d+,\), of train float32 \(12,\)"),
        ((X, Y > 1), r"labels are bool \(12,\); expected integers"),
        ((X.astype(np.float64) * 1e300, Y), "train: input 0 is not finite"),
        ((X, Y % 3), "validation has label 3, train only those up to 2"),
        ((X[:, :2], Y), r"inputs of validation are float32 \(3,\), of train float32 \(2,\)"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, wrong, message):
    with pytest.raises(DataError, match=message):
        save_arrays(tmp_path / "mine.npz", **{**SPLITS, "train": wrong})
    assert not list(tmp_path.iterdir())


def test_labels_of_a_file_of_somebody_elses_do_not_wrap_either(tmp_path):
    arrays = {f"{name}_inputs": X for name in SPLITS}
    labels = {f"{name}_labels": np.where(Y == 1, 2**32 + 1, Y) for name in SPLITS}
    np.savez(tmp_path / "mine.npz", **arrays, **labels)
    with pytest.raises(DataError, match="train: label 4294967297 of example 1; expected classes"):
        open_split("mine.npz", "train", data_dir=tmp_path)
    with pytest.raises(DataError, match="arrays train: label 4294967297 of example 1"):
        data.from_arrays(X, labels["train_labels"])


def test_a_users_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save_arrays("~/mine.npz", **SPLITS) == tmp_path / "mine.npz"
    assert len(open_split("~/mine.npz", "test")) == 8
    assert len(open_split("mine.npz", "test", data_dir="~")) == 8


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*mine.npz"):
        open_split("mine.npz", "train", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"mine.zip: expected a name that ends in .npz"):
        save_arrays(tmp_path / "mine.zip", **SPLITS)
    path = save_arrays(tmp_path / "mine.npz", **SPLITS)
    with pytest.raises(DataError, match=r"unknown split .*'trian' \(did you mean 'train'\?\)"):
        open_split(str(path), "trian")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"is no .npz file of arrays"):
        open_split(str(path), "train")
    np.savez(path, x=X, y=Y)
    with pytest.raises(DataError, match=r"has \['x', 'y'\]: expected train_inputs, train_labels"):
        open_split(str(path), "train")
    np.savez(path, train_inputs=X, train_labels=np.array([{}] * 12))
    with pytest.raises(DataError, match=r"is no .npz file of arrays: Object arrays cannot"):
        open_split(str(path), "train")
    np.savez(path, train_inputs=X)
    with pytest.raises(DataError, match="has train_inputs, but no train_labels"):
        open_split(str(path), "train")


@pytest.mark.parametrize("shape", [(12,), (12, 3)])
def test_real_labels_are_kept_as_float32_without_names_of_classes(tmp_path, shape):
    labels = np.random.default_rng(0).normal(size=shape)
    path = save_arrays(tmp_path / "mine.npz", train=(X, labels), test=(X[:5], labels[:5]))
    source = open_split(path.name, "train", data_dir=path.parent)
    assert source.facts == {}
    read = source.read(np.arange(12))["label"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, labels.astype(np.float32))
