"""open_split: both ways of reading, split syntax, and errors that say what to do."""

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kdq.data import DataError, open_split
from kdq.data.sources.writing import write_dataset


def test_both_ways_of_reading_agree(digits, digits_by_record):
    ids = np.array([5, 0, 359, 5])
    ours, theirs = digits.read(ids), digits_by_record.read(ids)
    for key, dtype in (("image", np.uint8), ("label", np.int32)):
        assert ours[key].dtype == theirs[key].dtype == dtype
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert digits.in_memory
    assert not digits_by_record.in_memory


def test_what_is_read_may_be_changed(digits):
    first = digits.read(np.arange(3))["image"]
    expected = first.copy()
    first[:] = 99
    np.testing.assert_array_equal(digits.read(np.arange(3))["image"], expected)


def test_slices_partition_a_split(digits, digits_dir):
    parts = [
        open_split("digits", f"validation[{part}]", data_dir=digits_dir)
        for part in (":90%", "90%:")
    ]
    assert [len(part) for part in parts] == [324, 36]
    images = np.concatenate([part.read(np.arange(len(part)))["image"] for part in parts])
    np.testing.assert_array_equal(images, digits.read(np.arange(360))["image"])


def test_digest_follows_the_contents(digits, digits_by_record, digits_dir):
    digests = {digits.digest, digits_by_record.digest}
    for in_memory in (True, False):
        for split in ("test", "validation[1:]"):
            source = open_split("digits", split, data_dir=digits_dir, in_memory=in_memory)
            again = open_split("digits", split, data_dir=digits_dir, in_memory=in_memory)
            assert source.digest == again.digest
            digests.add(source.digest)
    assert len(digests) == 6


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("train", "train", 1077),
        ("train", "validation", 0),
        ("train[:50%]", "train[50%:]", 0),
        ("train[:50%]", "train", 538),
        ("train[100:200]", "train[150:]", 50),
        ("train+test", "test[:7]", 7),
        ("all", "train[3:5]", 2),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_splits_know_what_they_share(digits_dir, one, other, shared, in_memory):
    a, b = (
        open_split("digits", split, data_dir=digits_dir, in_memory=in_memory)
        for split in (one, other)
    )
    assert (a.shared_with(b), b.shared_with(a)) == (shared, shared)


DAMAGES = {
    "a flipped bit": lambda file, data: file.write_bytes(
        data[:70000] + bytes([data[70000] ^ 1]) + data[70001:]
    ),
    "cut off": lambda file, data: file.write_bytes(data[: len(data) // 2]),
    "empty": lambda file, data: file.write_bytes(b""),
    "gone": lambda file, data: file.unlink(),
    "zeros": lambda file, data: file.write_bytes(bytes(len(data))),
}


SHARD = "digits-train.array_record-00000-of-00001"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((SHARD, damage) for damage in DAMAGES),
        *(("dataset_info.json", damage) for damage in ("cut off", "empty", "zeros")),
    ],
)
def test_damaged_data_are_named_in_one_line(digits_dir, tmp_path, file, damage):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    (place,) = tmp_path.rglob(file)
    DAMAGES[damage](place, place.read_bytes())
    with pytest.raises(DataError, match=r"digits.* can't be read .*remove that folder") as error:
        open_split("digits", "train", data_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ids", [[0, 360], [-1]])
def test_ids_out_of_range(digits, ids):
    with pytest.raises(IndexError, match="valid are 0 to 359"):
        digits.read(np.array(ids))


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("digits", "valdation", r"no split 'valdation'.*'train': 1077.*did you mean 'validation'"),
        ("digits", "train[", "no split"),
        ("digits", "train[2000:]", "no split"),
        ("digits", "train[:0]", "is empty"),
        ("digit", "train", r"no data set 'digit'.*cifar100.*did you mean 'digits'"),
        ("emnist/balance", "train", "no data set 'emnist/balance'.*did you mean 'emnist/balanced'"),
        ("kmnist", "train", r"not prepared.*kmnist/3.0.1.*launch/prepare_data.py --dataset=kmnist"),
        ("emnist", "train", "not prepared.*prepare_data.py --dataset=emnist/byclass "),
        ("cifar10", "train", "not prepared.*tfds build cifar10.*--file_format=array_record"),
    ],
)
def test_errors_name_the_choices(digits_dir, name, split, message):
    with pytest.raises(DataError, match=message):
        open_split(name, split, data_dir=digits_dir)


def store(data_dir, features, examples):
    """Writes a data set of one's own, which TFDS then knows from its files alone."""

    class Mine(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    write_dataset(lambda scratch: Mine(data_dir=scratch), data_dir)


IMAGE = np.zeros((2, 2, 3), np.uint8)


def image_features(num_classes=2, shape=(2, 2, 3), dtype=np.uint8):
    return {
        "image": tfds.features.Tensor(shape=shape, dtype=dtype),
        "label": tfds.features.Scalar(dtype=np.int64)
        if num_classes is None
        else tfds.features.ClassLabel(num_classes=num_classes),
    }


@pytest.mark.parametrize(
    ("features", "image", "message"),
    [
        (image_features(num_classes=None), IMAGE, "not an image-classification data set"),
        (image_features(dtype=np.float32), IMAGE.astype(np.float32), "they are float32"),
        (image_features(shape=(None, 2, 3)), IMAGE, r"of one size.*\(None, 2, 3\)"),
    ],
)
def test_other_kinds_of_data_set_are_refused(tmp_path, features, image, message):
    store(tmp_path, features, [{"image": image, "label": 0}])
    with pytest.raises(DataError, match=message):
        open_split("mine", "train", data_dir=tmp_path)


def test_a_format_without_random_access_is_refused(tmp_path, digits, digits_dir):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    path = tmp_path / "digits" / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match="stored as tfrecord, which has no random access"):
        open_split("digits", "train", data_dir=tmp_path)


def test_a_data_set_of_ones_own_with_colour(tmp_path):
    images = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    store(tmp_path, image_features(), [{"image": i, "label": k % 2} for k, i in enumerate(images)])
    source = open_split("mine", "train", data_dir=tmp_path)
    batch = source.read(np.arange(5))
    order = batch["image"][:, 0, 0, 0].argsort()
    np.testing.assert_array_equal(batch["image"][order], images)
    assert batch["label"][order].tolist() == [0, 1, 0, 1, 0]


def test_a_stored_label_out_of_range_is_refused(tmp_path):
    store(tmp_path, image_features(), [{"image": IMAGE, "label": -1}])
    with pytest.raises(DataError, match="label -1, out of range; there are 2 classes"):
        open_split("mine", "train", data_dir=tmp_path)
