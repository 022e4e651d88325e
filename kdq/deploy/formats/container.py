"""A file of arrays with a document: safetensors, with a checksum over both."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from kdq import files

KEY = "kdq"


class ContainerError(ValueError):
    """A file that is no such container, or a damaged one; the message says where."""


def write(
    path: str | os.PathLike[str], document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> int:
    """Writes a document (JSON-able, no NaN) and arrays, atomically; returns the file's size."""
    text = _text({**document, "sha256": _checksum(document, arrays)})
    data = safetensors.numpy.save(dict(arrays), metadata={KEY: text})
    files.write_atomic(path, data)
    return len(data)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the document and the arrays of a file. Raises ContainerError."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            texts, arrays = file.metadata() or {}, {}
            if KEY not in texts:
                raise ContainerError(f"its metadata have no {KEY!r} entry")
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise ContainerError(f"{name} is {dtype}, which this program does not read")
                arrays[name] = file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ContainerError(f"it can't be read: {error}") from error
    try:
        document = json.loads(texts[KEY], parse_constant=_no_number)
        if not isinstance(document, dict) or "format" not in document:
            raise ContainerError(f"its {KEY!r} entry has no format")
        is_as_written = _text(document) == texts[KEY]  # JSON has other ways to write the same
        stated, computed = document.pop("sha256", None), _checksum(document, arrays)
    except ContainerError:
        raise
    except (ValueError, RecursionError) as error:  # 1e999 is read as an infinity
        raise ContainerError(f"its {KEY!r} entry: {error}") from error
    if stated != computed or not is_as_written:
        raise ContainerError(
            f"sha256={stated!r}, but its contents have {computed!r}: it is damaged"
        )
    return document, arrays


# Those of NumPy and bfloat16; safetensors has others, which its NumPy side can't make.
_DTYPES = {"BOOL", "F64", "F32", "F16", "BF16"} | {
    f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)
}


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def _checksum(document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of the document and of the arrays with their names, dtypes and shapes."""
    digest = hashlib.sha256(_text(document).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, str(array.dtype), arrays[name].shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()
