"""Data folders from anywhere: nothing is imported or fetched, and no bomb is unpacked."""

import gzip
import json
import socket
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kdq.data import DataError, open_split, read_idx, save_arrays
from kdq.data.sources.writing import write_dataset

MODULE = "evil_features"


class Mine(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set that TFDS knows from its files alone."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(2, 2, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": iter([(0, {"image": np.ones((2, 2, 3), np.uint8), "label": 1})])}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A TFDS folder, and on the path a module that says when it is imported."""
    write_dataset(lambda scratch: Mine(data_dir=scratch), tmp_path)
    (tmp_path / f"{MODULE}.py").write_text(
        "import tensorflow_datasets as tfds\nclass Image(tfds.features.Image):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def feature_class(document, name):
    inner = next(iter(document["featuresDict"]["features"].values()))
    inner["pythonClassName"] = name


def legacy(document, name):
    document.clear()
    document |= {
        "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "content": json.dumps({"image": {"type": name, "content": {}}}),
    }


CHANGES = {
    "a feature": feature_class,
    "the whole": lambda document, name: document.update(pythonClassName=name),
    "snake case": lambda document, name: document.update(python_class_name=name),
    "of older TFDS": legacy,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_class_that_a_folder_names_is_not_imported(folder, change):
    assert len(open_split("mine", "train", data_dir=folder)) == 1
    path = folder / "mine" / "1.0.0" / "features.json"
    document = json.loads(path.read_text())
    CHANGES[change](document, f"{MODULE}.Image")
    path.write_text(json.dumps(document))
    for name in ("mine", "mine:1.0.0", "Mine"):
        with pytest.raises(DataError, match=rf"features.json names the class '{MODULE}.Image'"):
            open_split(name, "train", data_dir=folder)
    assert MODULE not in sys.modules


def test_a_class_in_the_description_is_not_imported(folder):
    path = folder / "mine" / "1.0.0" / "dataset_info.json"
    document = json.loads(path.read_text())
    document["features"] = {"pythonClassName": f"{MODULE}.Image"}
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"dataset_info.json names the class"):
        open_split("mine", "train", data_dir=folder)
    assert MODULE not in sys.modules


def test_a_class_that_is_imported_already_is_built(folder):
    __import__(MODULE)
    path = folder / "mine" / "1.0.0" / "features.json"
    document = json.loads(path.read_text())
    features = document["featuresDict"]["features"]
    features["image"] = {
        "pythonClassName": f"{MODULE}.Image",
        "image": {"dtype": "uint8", "shape": {"dimensions": ["2", "2", "3"]}},
    }
    path.write_text(json.dumps(document))
    assert open_split("mine", "train", data_dir=folder, in_memory=False).image_shape == (2, 2, 3)
    del sys.modules[MODULE]


@pytest.mark.parametrize(
    "name",
    [
        "huggingface:mnist",
        "huggingface:evil/x",
        "kaggle:x",
        "kaggle:x:1.0.0",
        "https://127.0.0.1:9/x",
        "mnist/try_gcs=True",
        "mnist\n",
        "../../etc",
        "/etc",
        "",
    ],
)
def test_names_of_other_places_are_refused_without_a_look(tmp_path, monkeypatch, name):
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "create_connection", None)
    message = "goes to no network" if ":" in name else "no data set"
    with pytest.raises(DataError, match=message):
        open_split(name, "train", data_dir=tmp_path)


def peak(function, message):
    """The most memory that a refusal took, in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


ZEROS = bytes(8 * 2**20)
HEADER = b"\0\0\x08\x01"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (10, "trailing bytes: over 10 bytes of values, 10 expected"),
        (2**31 + 1, "expected at most 2147483648"),
        (2**30, "truncated: .*1073741824 expected"),
    ],
)
def test_a_gzip_bomb_is_not_unpacked(tmp_path, stated, message):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(HEADER + struct.pack(">I", stated) + ZEROS))
    assert peak(lambda: read_idx(path), message) < 2**20


def test_a_header_of_more_than_the_file_takes_no_memory(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(HEADER + struct.pack(">I", 2**31) + b"abc")
    assert peak(lambda: read_idx(path), "truncated: 3 bytes of values") < 2**20


def npy_header(shape, dtype="|u1"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def test_an_npz_bomb_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "mine.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "validation", "test"):
            archive.writestr(f"{split}_inputs.npy", npy_header((2**23,)) + ZEROS)
    assert path.stat().st_size < 2**16
    # What one of these takes must not depend on a gigabyte that a test would have to write.
    monkeypatch.setattr("kdq.data.sources.arrays._MOST_BYTES", 2**24)
    assert peak(lambda: open_split(str(path), "train"), "unpacks to 25166208") < 2**20


@pytest.mark.parametrize("shape", [(2**40,), (2**31, 2**31), (-1,), (5,)])
def test_an_array_of_another_size_than_its_header_says_takes_no_memory(tmp_path, shape):
    path = tmp_path / "mine.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_inputs.npy", npy_header(shape) + b"abc")
    message = r"train_inputs.npy is uint8 .* by its header, which is not the 131 bytes"
    assert peak(lambda: open_split(str(path), "train"), message) < 2**20


def test_data_that_pack_well_are_read(tmp_path):
    path = tmp_path / "mine.npz"
    inputs = np.zeros((2**16, 32), np.uint8)
    labels = np.arange(2**16) % 2
    np.savez_compressed(path, train_inputs=inputs, train_labels=labels)
    assert path.stat().st_size < inputs.size / 100
    assert len(open_split(str(path), "train")) == 2**16


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + b"\0" * 18, b"PK\x03\x04" + b"\0" * 99])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"mine.npz"):
        open_split(str(path), "train")
    save_arrays(tmp_path / "good.npz", train=(np.ones((2, 3)), np.arange(2)))
    good = (tmp_path / "good.npz").read_bytes()
    for place in range(0, len(good), 7):
        damaged = bytearray(good)
        damaged[place] ^= 0x40
        path.write_bytes(damaged)
        try:
            read = open_split(str(path), "train").read(np.arange(2))
        except DataError:
            continue
        np.testing.assert_array_equal(read["image"], np.ones((2, 3)))  # a date, or the like
