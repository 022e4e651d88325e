"""A split of an image-classification data set, prepared by TFDS, read as NumPy arrays."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kdq.config import did_you_mean
from kdq.data import untrusted
from kdq.data.arrays import as_labels, read_arrays
from kdq.data.errors import DataError, damaged
from kdq.data.idx import IDX_DATASETS
from kdq.data.progress import track
from kdq.data.writing import default_data_dir, is_prepared
from kdq.fields import expand_user

KNOWN_DATASETS = ("digits", *IDX_DATASETS, "cifar10", "cifar100")
MOST_EXAMPLES = 2**31 - 1  # whose ids are int32
_IN_MEMORY_BYTES = 2 * 2**30
_READ_CHUNK = 1024  # records a read while loading into memory

# ids [n] -> images uint8 [n, height, width, channels], labels int32 [n]
Reader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """Random access to the examples of one split; ids are 0 .. len(source) - 1."""

    name: str  # with its config, "emnist/balanced"
    version: str
    split: str  # as given, "train[:90%]"
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]  # height, width, channels; of an .npz file anything
    num_examples: int
    in_memory: bool
    # In memory: sha256 of shape, images and labels. Otherwise (where reading everything would be
    # too slow) of name, version, split and the shards' names and sizes: the two differ.
    digest: str
    reader: Reader = dataclasses.field(repr=False)
    dtype: str = "uint8"  # of an .npz file float32 too
    records: tuple[tuple[str, int, int], ...] = ()  # (file, first, one past the last) of each part

    @property
    def is_images(self) -> bool:
        """Whether it can be augmented."""
        return self.dtype == "uint8" and len(self.image_shape) == 3

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return self.num_examples

    def shared_with(self, other: "Source") -> int:
        """Returns how many examples are in both: all if the contents are equal, else by place."""
        if self.digest == other.digest:
            return len(self)
        return sum(
            max(0, min(end, last) - max(start, first))
            for file, start, end in self.records
            for place, first, last in other.records
            if file == place
        )

    def read(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Reads examples by id, in the order given.

        Args:
          ids: [n] int, each in [0, len(self)).

        Returns:
          "image" [n, *image_shape] and "label" int32 [n], the caller's to change.

        Raises:
          IndexError: an id out of range.
        """
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(
                f"{self.name} {self.split}: ids from {ids.min()} to {ids.max()} asked for, "
                f"valid are 0 to {len(self) - 1}"
            )
        images, labels = self.reader(ids)
        return {"image": images, "label": labels}


def open_split(
    name: str, split: str, *, data_dir: str | Path | None = None, in_memory: bool | None = None
) -> Source:
    """Opens a split of a prepared TFDS data set (`digits` is prepared on first use), or of arrays.

    Args:
      name: TFDS name, with config and version where wanted: `mnist`, `emnist/balanced`, `cifar10`;
        or an `.npz` file, see `kdq.data.save_arrays`.
      split: TFDS split syntax: `train`, `train[:90%]`, `train[54000:]`; of an `.npz` file a name.
      data_dir: TFDS data directory, TFDS's default when None; of an `.npz` file its folder.
      in_memory: read everything once and serve it from memory; when None, if the pixels take less
        than 2 GiB.

    Raises:
      DataError: an unknown data set or split, a data set that is not prepared, not readable at
        random, or not for image classification.
    """
    if name.endswith(".npz"):
        path = Path(expand_user(Path(data_dir or "", name), "data"))
        (inputs, labels), classes = read_arrays(path, split)
        return from_arrays(inputs, labels, name=path.name, split=split, classes=classes)
    data_dir = default_data_dir() if data_dir is None else Path(expand_user(data_dir, "data_dir"))
    builder = _prepared_builder(name, data_dir)
    name = _full_name(builder)
    shape, class_names = _image_classification(name, builder.info)
    num_examples = _num_examples(name, split, builder.info)
    with _readable(f"{name} {split}", builder.data_dir):
        try:
            records = builder.as_data_source(split)
        except NotImplementedError as error:
            raise DataError(
                f"{name} in {builder.data_dir} is stored as {builder.info.file_format.value}, "
                "which has no random access; remove it and prepare it again as array_record"
            ) from error
    reader = _record_reader(f"{name} {split}", builder.data_dir, records, shape, len(class_names))
    if in_memory is None:
        in_memory = num_examples * int(np.prod(shape)) < _IN_MEMORY_BYTES
    if in_memory:
        images, labels = _load(reader, num_examples, shape, f"{name} {split}")
        digest = hashlib.sha256(repr(images.shape).encode())
        digest.update(images)
        digest.update(labels)
        reader = lambda ids: (images[ids], labels[ids])
    else:
        digest = _shard_digest(builder.info, split)
    return Source(
        name=name,
        version=str(builder.version),
        split=split,
        class_names=class_names,
        image_shape=shape,
        num_examples=num_examples,
        in_memory=in_memory,
        digest=digest.hexdigest(),
        reader=reader,
        records=tuple(
            (part.filename, part.skip, part.skip + part.take)
            for part in builder.info.splits[split].file_instructions
        ),
    )


def from_arrays(
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    name: str = "arrays",
    split: str = "train",
    classes: int | None = None,
) -> Source:
    """Arrays in memory as a split.

    Args:
      inputs: [n, ...] uint8 or float32.
      labels: [n] int, classes from 0.
      name: what to call it.
      split: likewise.
      classes: how many there are; None is up to the largest label.

    Raises:
      DataError: labels that are no classes.
    """
    labels = as_labels(labels, f"{name} {split}")
    digest = hashlib.sha256(repr((inputs.shape, inputs.dtype.name)).encode())
    digest.update(np.ascontiguousarray(inputs))
    digest.update(np.ascontiguousarray(labels))
    return Source(
        name=name,
        version="",
        split=split,
        class_names=tuple(map(str, range(classes or int(labels.max()) + 1))),
        image_shape=inputs.shape[1:],
        num_examples=len(inputs),
        in_memory=True,
        digest=digest.hexdigest(),
        reader=lambda ids: (inputs[ids], labels[ids]),
        dtype=inputs.dtype.name,
    )


def _prepared_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a data set that is prepared under `data_dir`."""
    untrusted.check_name(name)
    untrusted.check_features(name, data_dir)
    base = re.split("[/:]", name)[0]
    if base == "digits":
        # Registers the builder; imported here as only `digits` needs scikit-learn (seconds).
        from kdq.data.digits import prepare_digits  # noqa: PLC0415

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except ValueError as error:  # DatasetNotFoundError is one; so is an unknown config or version
        known = ", ".join(KNOWN_DATASETS)
        close = did_you_mean(
            name, {*KNOWN_DATASETS, *tfds.list_builders(with_community_datasets=False)}
        )
        raise DataError(
            f"no data set {name!r} in TFDS or in {data_dir}; known here: {known}, and other "
            f"image-classification data sets of TFDS{close}"
        ) from error
    except Exception as error:  # of the parser of what is in the folder
        raise damaged(name, data_dir / base, error) from error
    if is_prepared(builder.data_dir):
        return builder
    if base == "digits":
        prepare_digits(data_dir)
        return tfds.builder(name, data_dir=data_dir)
    name = _full_name(builder)
    command = (
        f"python launch/prepare_data.py --dataset={name} --source=DIR --data_dir={data_dir}, where "
        "DIR holds its IDX files"
        if name in IDX_DATASETS
        else f"tfds build {name} --data_dir={data_dir} --file_format=array_record, where "
        "TensorFlow is installed (TFDS needs it to write images)"
    )
    raise DataError(f"{name} is not prepared: nothing in {builder.data_dir}. Run {command}")


def _full_name(builder: tfds.core.DatasetBuilder) -> str:
    """Returns name and config without the version: `emnist` has the default `emnist/byclass`."""
    config = builder.builder_config
    return f"{builder.name}/{config.name}" if config else builder.name


def _image_classification(
    name: str, info: tfds.core.DatasetInfo
) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """Returns image shape and class names, or says why the data set is not one of images."""
    features = info.features
    named = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = named.get("image"), named.get("label")
    if image is None or not isinstance(label, tfds.features.ClassLabel):
        raise DataError(
            f"{name} is not an image-classification data set: it needs the features 'image' and "
            f"'label' (a ClassLabel), it has {features}"
        )
    if image.np_dtype != np.uint8 or len(image.shape) != 3 or None in image.shape:
        raise DataError(
            f"{name}: images must be uint8 of one size [height, width, channels]; "
            f"they are {np.dtype(image.np_dtype)} {image.shape}"
        )
    return tuple(image.shape), tuple(label.names)


def _num_examples(name: str, split: str, info: tfds.core.DatasetInfo) -> int:
    """Returns the number of examples of a split, or says which splits there are."""
    sizes = {key: value.num_examples for key, value in info.splits.items()}
    try:
        count = info.splits[split].num_examples
    except (KeyError, ValueError, AssertionError) as error:
        base = re.split(r"[\[+]", split)[0]
        raise DataError(
            f"{name} has no split {split!r}; its splits (and sizes) are {sizes}, or a part of one, "
            "like 'train[:90%]'" + (did_you_mean(base, sizes) if base not in sizes else "")
        ) from error
    if count == 0:
        raise DataError(f"{name}: split {split!r} is empty; its splits (and sizes) are {sizes}")
    if count > MOST_EXAMPLES:
        raise DataError(f"{name}: split {split!r} has {count} examples; at most {MOST_EXAMPLES}")
    return count


def _record_reader(
    name: str, folder: Any, records: Any, shape: tuple[int, ...], num_classes: int
) -> Reader:
    """Returns a reader that fetches and decodes the records asked for, at each call."""

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with _readable(name, folder):
            examples = records.__getitems__(ids.tolist())
            labels = np.array([example["label"] for example in examples])
            images = np.stack([example["image"] for example in examples])
        if images.shape[1:] != shape or images.dtype != np.uint8:
            raise DataError(
                f"{name} in {folder} has images {images.dtype} {images.shape[1:]}, where its "
                f"description says uint8 {shape}: remove that folder and prepare it again"
            )
        bad = (labels < 0) | (labels >= num_classes)
        if bad.any():
            raise DataError(
                f"{name}: example {ids[bad][0]} has label {labels[bad][0]}, out of range; there "
                f"are {num_classes} classes, 0 to {num_classes - 1}"
            )
        return images, labels.astype(np.int32)

    return read


@contextlib.contextmanager
def _readable(name: str, folder: Any) -> Iterator[None]:
    """Turns what readers and decoders raise of damaged files into a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # array_record and the decoders raise all kinds
        raise damaged(name, folder, error) from error


def _load(
    reader: Reader, num_examples: int, shape: tuple[int, int, int], description: str
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a whole split: images uint8 [n, height, width, channels], labels int32 [n]."""
    images = np.empty((num_examples, *shape), np.uint8)
    labels = np.empty(num_examples, np.int32)
    starts = range(0, num_examples, _READ_CHUNK)
    for start in track(starts, f"reading {description}", len(starts)):
        ids = np.arange(start, min(start + _READ_CHUNK, num_examples))
        images[ids], labels[ids] = reader(ids)
    return images, labels


def _shard_digest(info: tfds.core.DatasetInfo, split: str) -> "hashlib._Hash":
    """Returns a digest of a split's identity and shards, without reading them."""
    digest = hashlib.sha256(f"{info.full_name} {split} {info.splits[split].num_examples}".encode())
    for part in info.splits[split].file_instructions:
        path = Path(part.filename)
        digest.update(f" {path.name} {path.stat().st_size} {part.skip} {part.take}".encode())
    return digest
