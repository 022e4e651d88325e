"""IDX files: the reader's errors, and round trips through plain TFDS."""

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kdq.data import DataError, open_split, prepare, read_idx
from kdq.data.sources import idx

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist


def sort_pairs(pairs) -> list[tuple[bytes, int]]:
    return sorted((np.asarray(image).tobytes(), int(label)) for image, label in pairs)


@pytest.mark.parametrize(
    ("dataset", "num_classes", "compress"),
    [("mnist", 10, True), ("kmnist", 10, False), ("emnist/balanced", 47, True)],
)
def test_prepared_data_reads_alike_in_tfds_and_kdq(
    tmp_path, write_idx, dataset, num_classes, compress
):
    arrays = write_idx(dataset, num_classes, compress)
    data_dir = tmp_path / "tfds"
    directory = prepare(dataset, tmp_path / "idx", data_dir)
    assert directory == Path(tfds.builder(dataset, data_dir=data_dir).data_dir)
    for split, (images, labels) in arrays.items():
        plain = tfds.data_source(dataset, split=split, data_dir=data_dir, download=False)
        ours = open_split(dataset, split, data_dir=data_dir)
        batch = ours.read(np.arange(len(ours)))
        assert [example["label"] for example in plain] == batch["label"].tolist()
        np.testing.assert_array_equal([example["image"] for example in plain], batch["image"])
        written = sort_pairs(zip(images, labels, strict=True))
        assert sort_pairs(zip(batch["image"], batch["label"], strict=True)) == written
        assert ours.num_classes == num_classes
        assert ours.image_shape == (28, 28, 1)
    assert not list(data_dir.glob(".kdq-incomplete-*"))


def test_prepare_twice_does_nothing(tmp_path, write_idx):
    write_idx()
    directory = prepare("mnist", tmp_path / "idx", tmp_path / "tfds")
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    shutil.rmtree(tmp_path / "idx")  # not even read
    assert prepare("mnist", tmp_path / "idx", tmp_path / "tfds") == directory
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def header(*values: int, magic: bytes = b"\0\0\x08\x01") -> bytes:
    return magic + struct.pack(f">{len(values)}I", *values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\x89PNG....", "starts with 89 50 4e 47"),
        (header(3, magic=b"\0\0\x07\x01") + b"abc", "no IDX magic"),
        (
            header(3, magic=b"\0\0\x0d\x01") + b"abcdefghijkl",
            "float32 by the header; expected uint8",
        ),
        (b"\0\0\x08\x03\0\0", "truncated: 6 bytes, the header of 3 dimensions takes 16"),
        (header(4) + b"abc", "truncated: 3 bytes of values, 4 expected"),
        (header(2) + b"abc", "trailing bytes: 3 bytes of values, 2 expected"),
    ],
)
def test_read_idx_refuses_damaged_files(tmp_path, content, message):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"no" + data])
def test_read_idx_refuses_damaged_gzip(tmp_path, damage):
    path = tmp_path / "labels.gz"
    path.write_bytes(damage(gzip.compress(header(3) + b"abc")))
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_idx(path)


def test_read_idx_values_are_row_major(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\0\0\x08\x02" + struct.pack(">2I", 2, 3) + bytes(range(6)))
    np.testing.assert_array_equal(read_idx(path), [[0, 1, 2], [3, 4, 5]])


def rewrite(path: Path, array: np.ndarray) -> None:
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes(), 1))


def swap(directory: Path) -> None:
    images, labels = (directory / f"train-{k}-ubyte.gz" for k in ("images-idx3", "labels-idx1"))
    images.rename(directory / "x")
    labels.rename(images)
    (directory / "x").rename(labels)


DAMAGE = {
    "mislabelled": swap,
    "no t10k-images-idx3-ubyte.gz": lambda d: (d / "t10k-images-idx3-ubyte.gz").unlink(),
    "label 10 of example 2 is out of range": lambda d: rewrite(
        d / "t10k-labels-idx1-ubyte.gz", np.array([0, 1, 10] + [0] * 8, np.uint8)
    ),
    "23 images but .* 22 labels": lambda d: rewrite(
        d / "train-labels-idx1-ubyte.gz", np.zeros(22, np.uint8)
    ),
    r"images are \(27, 28\)": lambda d: rewrite(
        d / "train-images-idx3-ubyte.gz", np.zeros((23, 27, 28), np.uint8)
    ),
    "no examples": lambda d: (
        rewrite(d / "t10k-labels-idx1-ubyte.gz", np.zeros(0, np.uint8)),
        rewrite(d / "t10k-images-idx3-ubyte.gz", np.zeros((0, 28, 28), np.uint8)),
    ),
    "keep one": lambda d: (d / "t10k-labels-idx1-ubyte").touch(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_prepare_checks_before_it_writes(tmp_path, write_idx, message):
    write_idx()
    DAMAGE[message](tmp_path / "idx")
    with pytest.raises(DataError, match=message):
        prepare("mnist", tmp_path / "idx", tmp_path / "tfds")
    assert not (tmp_path / "tfds").exists()


def test_failure_while_writing_leaves_nothing(tmp_path, write_idx, monkeypatch):
    write_idx("emnist/letters", 37)
    written = []

    def fail_half_way(examples, description, total):
        for count, example in enumerate(examples):
            if "test" in description and count == total // 2:  # train is written by now
                written.extend((tmp_path / "tfds").rglob("*"))
                raise OSError("disk full")
            yield example

    monkeypatch.setattr(idx, "track", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        prepare("emnist/letters", tmp_path / "idx", tmp_path / "tfds")
    assert written  # there was something to clean up
    assert list((tmp_path / "tfds").iterdir()) == []
    monkeypatch.undo()
    prepare("emnist/letters", tmp_path / "idx", tmp_path / "tfds")
    assert len(open_split("emnist/letters", "test", data_dir=tmp_path / "tfds")) == 11


def test_prepare_does_not_replace_what_is_in_the_way(tmp_path, write_idx):
    write_idx()
    other = tmp_path / "tfds" / "mnist" / "3.0.1"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not a prepared data set; remove it"):
        prepare("mnist", tmp_path / "idx", tmp_path / "tfds")
    assert [path.name for path in (tmp_path / "tfds").rglob("*")] == ["mnist", "3.0.1", "notes.txt"]


@pytest.mark.parametrize("name", ["fashion-mnist", "emnist", "cifar10"])
def test_prepare_unknown_dataset_lists_the_valid_ones(tmp_path, name):
    with pytest.raises(DataError, match=rf"'{name}'; valid: mnist, fashion_mnist, .*emnist/mnist"):
        prepare(name, tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian(tmp_path):
    prepare("fashion_mnist", FASHION, tmp_path)
    images = read_idx(FASHION / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(FASHION / "t10k-labels-idx1-ubyte.gz")
    source = open_split("fashion_mnist", "test", data_dir=tmp_path)
    batch = source.read(np.arange(len(source)))
    assert source.class_names[9] == "Ankle boot"
    assert sort_pairs(zip(batch["image"], batch["label"], strict=True)) == sort_pairs(
        zip(images, labels, strict=True)
    )
    assert len(open_split("fashion_mnist", "train[54000:]", data_dir=tmp_path)) == 6000
    plain = tfds.data_source("fashion_mnist", split="test", data_dir=tmp_path, download=False)
    for index in (0, 1234, 9999):
        np.testing.assert_array_equal(plain[index]["image"], batch["image"][index])
        assert plain[index]["label"] == batch["label"][index]
