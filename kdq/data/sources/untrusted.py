"""Data sets that would make TFDS import modules or go to a network are refused."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming

from kdq.data.source import DataError, damaged

# NAME[/CONFIG][:VERSION] of TFDS, without a namespace (another place) and without arguments.
NAME = re.compile(r"[\w\-]+(/[\w+.\-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?")
_CLASS_KEYS = ("pythonClassName", "python_class_name")
_DEEPEST = 3  # folders below that of a data set: its config, its version
_MOST_BYTES = 64 * 2**20  # of a JSON file that describes a data set


def check(name: str, data_dir: Path) -> None:
    """Raises DataError for a data set elsewhere ("huggingface:mnist"), or of unknown classes.

    TFDS imports the module of any class that `features.json` or
    `dataset_info.json` names: all that are there are looked into, since TFDS chooses among configs
    and versions.
    """
    place, colon, _ = name.partition(":")
    if not NAME.fullmatch(name):
        raise DataError(
            f"data set {name!r}: kdq reads what is prepared on disk, and goes to no network: "
            f"prepare it there first, and name it without {place + ':'!r}; a version is three "
            "numbers, as in 'mnist:3.0.1'"
            if colon
            else f"no data set {name!r}: expected NAME, NAME/CONFIG or NAME:VERSION of TFDS, or "
            "FILE.npz"
        )
    folder = naming.camelcase_to_snakecase(re.split("[/:]", name)[0])
    for depth in range(_DEEPEST + 1):
        for file in ("features.json", "dataset_info.json"):
            for path in sorted(Path(data_dir).glob("/".join([folder, *["*"] * depth, file]))):
                _check_file(name, path)


def _check_file(name: str, path: Path) -> None:
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        raise DataError(f"{path}: expected a file of at most {_MOST_BYTES} bytes")
    try:
        classes = set(_classes(json.loads(path.read_text())))
    except (ValueError, RecursionError) as error:
        raise damaged(name, path.parent, error) from error
    if unknown := sorted(classes - set(_known(tfds.features.FeatureConnector))):
        raise DataError(
            f"{path} names the class {unknown[0]!r}, which is none of TFDS's features, and TFDS "
            "would import it: if you trust it, import its module before"
        )


def _classes(value: Any) -> Iterator[str]:
    """Yields the names of classes in a description of features; a text may be JSON again."""
    if isinstance(value, dict):
        for key in _CLASS_KEYS:
            if key in value:
                yield str(value[key])
        if "type" in value and "content" in value:  # of older TFDS
            yield str(value["type"])
        for inner in value.values():
            yield from _classes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _classes(inner)
    elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            inner = json.loads(value)
        except ValueError:
            return  # a description that begins with a bracket
        yield from _classes(inner)


def _known(cls: type) -> Iterator[str]:
    """Yields the names by which TFDS finds a class, and those derived from it, as they are."""
    yield f"{cls.__module__}.{cls.__name__}"
    yield from vars(cls).get("ALIASES", [])
    for derived in cls.__subclasses__():
        yield from _known(derived)
