"""A file of arrays with a document: safetensors, with a checksum; codes of 1 to 8 bits in it."""

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


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs unsigned codes of any shape into bytes, the first code in the lowest bits.

    Returns uint8 [ceil(codes.size * bits / 8)]; the bits past the last code are 0. Raises
    ValueError for bits that are not 1 to 8, or a code that does not fit.
    """
    flat = np.asarray(codes).reshape(-1)
    packed_bytes(flat.size, bits)  # checks the bits
    if flat.size and (flat.min() < 0 or flat.max() >= 2**bits):
        raise ValueError(f"codes from {flat.min()} to {flat.max()} do not fit in {bits} bits")
    as_bits = np.unpackbits(flat.astype(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(as_bits, bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns the `count` codes that `pack` packed, uint8 [count]. Raises ValueError as it does,
    or for another number of bytes than so many codes take."""
    expected = packed_bytes(count, bits)
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"{count} codes of {bits} bits take uint8 [{expected}], "
            f"got {packed.dtype} {packed.shape}"
        )
    groups = -(-count // 8)  # eight codes begin and end with a byte
    padded = np.zeros(groups * bits, np.uint8)
    padded[:expected] = packed
    padded, codes = padded.reshape(groups, bits), np.empty((groups, 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = padded[:, byte] >> shift
        if shift + bits > 8:
            code |= padded[:, byte + 1] << (8 - shift)
        codes[:, i] = code & (2**bits - 1)
    return codes.reshape(-1)[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Returns how many bytes `count` codes of `bits` bits, 1 to 8, take."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: expected 1 to 8")
    return -(-count * bits // 8)
