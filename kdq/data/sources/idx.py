"""IDX files (MNIST's format): a strict reader, and an importer that writes standard TFDS data sets.

Format: two zero bytes, a type byte (8 is uint8), a byte with the number of dimensions, each
dimension as a big-endian uint32, then the values. http://yann.lecun.com/exdb/mnist/
"""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from kdq.data.source import DataError
from kdq.data.sources.writing import default_data_dir, is_prepared, track, write_dataset
from kdq.fields import expand_user, unknown

# The official numbers of examples, (train, test): others are accepted, but said aloud.
_OFFICIAL = {
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "kmnist": (60_000, 10_000),
    "emnist/byclass": (697_932, 116_323),
    "emnist/bymerge": (697_932, 116_323),
    "emnist/balanced": (112_800, 18_800),
    "emnist/letters": (88_800, 14_800),
    "emnist/digits": (240_000, 40_000),
    "emnist/mnist": (60_000, 10_000),
}
IDX_DATASETS = tuple(_OFFICIAL)
_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
_MOST_BYTES = 2 * 2**30  # the largest of these data sets, EMNIST by class, has 0.5 GiB of pixels
_MOST_GZIP_RATIO = 1032  # of what deflate can pack


def read_idx(path: str | Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped when its name ends in `.gz`: a uint8 array.

    No more is unpacked than the header states, nor more than 2 GiB.

    Raises:
      DataError: not gzip, a wrong magic number, a type other than uint8, too few or too many bytes.
      FileNotFoundError: no such file.
    """
    path = Path(path)
    packed, size = path.suffix == ".gz", path.stat().st_size
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            shape = _read_header(path, file)
            header, expected = 4 + 4 * len(shape), math.prod(shape)
            if expected > _MOST_BYTES:
                raise DataError(
                    f"{path}: {expected} bytes of values by the header {shape}; expected at most "
                    f"{_MOST_BYTES}"
                )
            # Where the file can't hold so many bytes no memory is taken for them.
            count = _MOST_GZIP_RATIO * size if packed else size - header
            if expected <= count:
                values = file.read(expected + 1)
                count = len(values)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})") from error
    if count < expected:
        raise DataError(
            f"{path}: truncated: {count} bytes of values, {expected} expected for {shape}"
        )
    if count > expected:
        there = f"over {expected}" if packed else size - header
        raise DataError(
            f"{path}: trailing bytes: {there} bytes of values, {expected} expected for {shape}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_header(path: Path, file: BinaryIO) -> tuple[int, ...]:
    """Returns the shape that an IDX file states."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or magic[3] == 0:
        raise DataError(
            f"{path}: the file starts with {magic.hex(' ') or 'nothing'}, which is no IDX magic "
            "number; expected 00 00, 08 (uint8), then the number of dimensions"
        )
    if _TYPES[magic[2]] != "uint8":
        raise DataError(f"{path}: values are {_TYPES[magic[2]]} by the header; expected uint8")
    ndim = magic[3]
    sizes = file.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise DataError(
            f"{path}: truncated: {4 + len(sizes)} bytes, the header of {ndim} dimensions takes "
            f"{4 + 4 * ndim}"
        )
    return struct.unpack(f">{ndim}I", sizes)


def prepare(dataset: str, source_dir: str | Path, data_dir: str | Path | None = None) -> Path:
    """Prepares a data set of the MNIST family from local IDX files, as TFDS itself would.

    Everything is read and checked before anything is written, and what is written appears under
    `data_dir` by one rename. A data set that is prepared already is left as it is.

    Args:
      dataset: one of `IDX_DATASETS`, for example `fashion_mnist` or `emnist/balanced`.
      source_dir: holds the four files with their official names, gzipped or not.
      data_dir: a TFDS data directory; TFDS's default when None.

    Returns the directory of the prepared data set. Raises DataError for an unknown data set, a
    missing, damaged, mislabelled or inconsistent file.
    """
    if dataset not in IDX_DATASETS:
        raise DataError(unknown("data set of IDX files", dataset, IDX_DATASETS))
    data_dir = default_data_dir() if data_dir is None else Path(expand_user(data_dir, "data_dir"))
    source_dir = Path(expand_user(source_dir, "source_dir"))
    builder = tfds.builder(dataset, data_dir=data_dir)
    if is_prepared(builder.data_dir):
        logging.info("%s is already prepared in %s; nothing to do", dataset, builder.data_dir)
        return Path(builder.data_dir)

    features = builder.info.features
    splits = {
        split: _read_split(dataset, split, source_dir, features) for split in ("train", "test")
    }
    importer = _make_importer(type(builder), splits)
    config = {"config": builder.builder_config.name} if builder.builder_config else {}
    return write_dataset(lambda scratch: importer(data_dir=scratch, **config), data_dir)


def _read_split(
    dataset: str, split: str, source_dir: Path, features: tfds.features.FeaturesDict
) -> tuple[np.ndarray, np.ndarray]:
    """Returns one split's images [n, height, width] and labels [n], checked against each other."""
    image_path = _find(dataset, split, source_dir, "images-idx3-ubyte")
    label_path = _find(dataset, split, source_dir, "labels-idx1-ubyte")
    images, labels = read_idx(image_path), read_idx(label_path)
    checked = (image_path, images, "images", 3), (label_path, labels, "labels", 1)
    for path, array, kind, ndim in checked:
        if array.ndim != ndim:
            raise DataError(
                f"{path}: mislabelled: the name says {kind} ({ndim} dimensions), the file holds "
                f"{array.ndim} dimensions, {array.shape}"
            )
    size, num_classes = features["image"].shape[:2], features["label"].num_classes
    if images.shape[1:] != size:
        raise DataError(f"{image_path}: images are {images.shape[1:]}; {dataset} has {size}")
    if len(images) != len(labels):
        raise DataError(
            f"{image_path} holds {len(images)} images but {label_path} holds {len(labels)} labels"
        )
    if len(labels) == 0:
        raise DataError(f"{label_path}: no examples")
    if labels.max() >= num_classes:
        where = int(labels.argmax())
        raise DataError(
            f"{label_path}: label {labels[where]} of example {where} is out of range; {dataset} "
            f"has {num_classes} classes, 0 to {num_classes - 1}"
        )
    official = _OFFICIAL[dataset][split == "test"]
    if len(labels) != official:
        logging.warning(
            "%s: %d examples; the official %s split of %s has %d",
            image_path, len(labels), split, dataset, official,
        )  # fmt: skip
    return images, labels


def _find(dataset: str, split: str, source_dir: Path, kind: str) -> Path:
    """Returns the path of one of the four files, gzipped or not."""
    _, _, config = dataset.partition("/")
    stem = f"emnist-{config}-{split}" if config else {"train": "train", "test": "t10k"}[split]
    candidates = [source_dir / f"{stem}-{kind}{suffix}" for suffix in (".gz", "")]
    paths = [path for path in candidates if path.is_file()]
    if not paths:
        raise DataError(f"{dataset}: no {candidates[0].name} (nor without .gz) in {source_dir}")
    if len(paths) > 1:
        raise DataError(
            f"{dataset}: both {paths[0].name} and {paths[1].name} in {source_dir}; keep one"
        )
    return paths[0]


def _make_importer(builder_class: type, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> type:
    """Returns TFDS's own builder with its download and its TensorFlow parser replaced.

    Name, version, configs and features are inherited and the keys are the same, so TFDS's hash
    puts the examples in the order in which TFDS itself would write them.
    """

    class Importer(builder_class, skip_registration=True):
        name = builder_class.name
        __module__ = builder_class.__module__  # TFDS records it

        def _split_generators(self, dl_manager) -> dict:
            return {
                split: self._generate_examples(split, *arrays) for split, arrays in splits.items()
            }

        def _generate_examples(
            self, split: str, images: np.ndarray, labels: np.ndarray
        ) -> Iterator[tuple[int, dict]]:
            pairs = zip(images, labels, strict=True)
            examples = track(pairs, f"writing {self.name} {split}", len(labels))
            for index, (image, label) in enumerate(examples):
                # TFDS encodes a PIL image as PNG by itself, an array with TensorFlow.
                yield index, {"image": Image.fromarray(image), "label": int(label)}

    return Importer
