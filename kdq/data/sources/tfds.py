"""A split of an image-classification data set, prepared by TFDS, read as NumPy arrays."""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kdq.data.source import DataError, Reader, Source, Spec, damaged, hold_arrays
from kdq.data.sources import untrusted
from kdq.data.sources.idx import IDX_DATASETS
from kdq.data.sources.writing import default_data_dir, is_prepared, track
from kdq.fields import did_you_mean, expand_user

KNOWN_DATASETS = ("digits", *IDX_DATASETS, "cifar10", "cifar100")
MOST_EXAMPLES = 2**31 - 1  # whose ids are int32
_IN_MEMORY_BYTES = 2 * 2**30
_READ_CHUNK = 1024  # records a read while loading into memory


def open_prepared(
    name: str, split: str, data_dir: str | Path | None, in_memory: bool | None
) -> Source:
    """Opens a split of a data set that is prepared; see `kdq.data.open_split`."""
    data_dir = default_data_dir() if data_dir is None else Path(expand_user(data_dir, "data_dir"))
    builder = _prepared_builder(name, data_dir)
    name = _full_name(builder)
    spec, class_names = _image_classification(name, builder.info)
    num_examples = _num_examples(name, split, builder.info)
    with _readable(f"{name} {split}", builder.data_dir):
        try:
            records = builder.as_data_source(split)
        except NotImplementedError as error:
            raise DataError(
                f"{name} in {builder.data_dir} is stored as {builder.info.file_format.value}, "
                "which has no random access; remove it and prepare it again as array_record"
            ) from error
    if in_memory is None:
        in_memory = num_examples * int(np.prod(spec["image"].shape)) < _IN_MEMORY_BYTES
    source = Source(
        name=name,
        version=str(builder.version),
        split=split,
        spec=spec,
        facts={"class_names": class_names},
        num_examples=num_examples,
        in_memory=False,
        digest="" if in_memory else _shard_digest(builder.info, split),
        reader=_record_reader(
            f"{name} {split}", builder.data_dir, records, spec["image"].shape, len(class_names)
        ),
        records=tuple(
            (part.filename, part.skip, part.skip + part.take)
            for part in builder.info.splits[split].file_instructions
        ),
    )
    return _load(source) if in_memory else source


def _load(source: Source) -> Source:
    """Returns the same source with all examples in memory."""
    arrays = {
        key: np.empty((len(source), *spec.shape), spec.dtype) for key, spec in source.spec.items()
    }
    starts = range(0, len(source), _READ_CHUNK)
    for start in track(starts, f"reading {source.name} {source.split}", len(starts)):
        ids = np.arange(start, min(start + _READ_CHUNK, len(source)))
        for key, values in source.reader(ids).items():
            arrays[key][ids] = values
    kept = ("name", "version", "split", "facts", "records")
    fields = {field: getattr(source, field) for field in kept}
    return hold_arrays(arrays, arrays["image"].shape, **fields)


def _prepared_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a data set that is prepared under `data_dir`."""
    untrusted.check(name, data_dir)
    base = re.split("[/:]", name)[0]
    if base == "digits":
        # Registers the builder; imported here as only `digits` needs scikit-learn (seconds).
        from kdq.data.sources.digits import prepare_digits  # noqa: PLC0415

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
) -> tuple[Mapping[str, Spec], tuple[str, ...]]:
    """Returns an example's arrays and the class names; raises if it is no data set of images."""
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
    spec = {
        "image": Spec(tuple(image.shape), np.dtype(np.uint8)),
        "label": Spec((), np.dtype(np.int32)),
    }
    return spec, tuple(label.names)


def _num_examples(name: str, split: str, info: tfds.core.DatasetInfo) -> int:
    """Returns the number of examples of a split; raises with the splits that there are."""
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
    """Returns a reader that fetches and decodes records at each call."""

    def read(ids: np.ndarray) -> dict[str, np.ndarray]:
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
        return {"image": images, "label": labels.astype(np.int32)}

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


def _shard_digest(info: tfds.core.DatasetInfo, split: str) -> str:
    """Returns a digest of a split's identity and shards, without reading them."""
    digest = hashlib.sha256(f"{info.full_name} {split} {info.splits[split].num_examples}".encode())
    for part in info.splits[split].file_instructions:
        path = Path(part.filename)
        digest.update(f" {path.name} {path.stat().st_size} {part.skip} {part.take}".encode())
    return digest.hexdigest()
