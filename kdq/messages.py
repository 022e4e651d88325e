"""Values as bytes that another process reads without running what is in them.

JSON for what is plain, with arrays as raw bytes behind it; dataclasses of kdq and exceptions by
their names, which a reader looks up among the modules that it has imported.
"""

import builtins
import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

_LENGTH_BYTES = 8


def encode(value: Any) -> bytes:
    """Returns the bytes of a value. Raises TypeError for one that has anything in it but None,
    booleans, numbers, texts, lists, tuples, mappings, arrays of NumPy and JAX, PRNG keys,
    dataclasses of kdq and exceptions."""
    buffers: list[bytes] = []
    text = json.dumps(_encoded(value, buffers), separators=(",", ":")).encode()
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *buffers])


def decode(data: bytes) -> Any:
    """Returns the value that was encoded; a mapping as a dict, an exception that this process does
    not know as a RuntimeError with its name. Raises ValueError for bytes of something else."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    try:
        return _decoded(json.loads(data[_LENGTH_BYTES:start]), memoryview(data)[start:])
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"no message of kdq: {error!r}") from error


def _encoded(value: Any, buffers: list[bytes]) -> Any:
    """Returns what JSON holds as it is, else an object whose only key is the kind of the value."""
    inner = lambda values: [_encoded(v, buffers) for v in values]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: inner(value)}
    if isinstance(value, Mapping):
        return {"dict": [inner(item) for item in value.items()]}
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        words = inner([jax.random.key_data(value)])
        return {"key": [str(jax.random.key_impl(value)), *words]}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        is_jax, is_scalar = isinstance(value, jax.Array), isinstance(value, np.generic)
        array = np.asarray(value, order="C")
        if array.dtype.hasobject:
            raise TypeError("an array of objects can't be sent to another process")
        start = sum(map(len, buffers))
        buffers.append(array.tobytes())
        library = "jax" if is_jax else "scalar" if is_scalar else "numpy"
        return {"array": [library, array.dtype.name, list(array.shape), start]}
    if isinstance(value, BaseException):
        arguments = value.args
        if isinstance(value, OSError) and value.filename is not None:
            arguments = (value.errno, value.strerror, str(value.filename))
        plain = [v if isinstance(v, str | int | float | None) else str(v) for v in arguments]
        return {"error": [_name(type(value)), str(value), inner(plain)]}
    if dataclasses.is_dataclass(type(value)) and _name(type(value)).startswith("kdq."):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return {"class": [_name(type(value)), *inner([{f: getattr(value, f) for f in fields}])]}
    raise TypeError(f"a {type(value).__name__} can't be sent to another process: {value!r:.60}")


def _decoded(value: Any, buffer: memoryview) -> Any:
    if isinstance(value, list):
        return [_decoded(v, buffer) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "array":
        return _array(*content, buffer)
    makers = {"list": list, "tuple": tuple, "dict": dict}
    makers |= {"key": _key, "error": _error, "class": _instance}
    if kind not in makers:
        raise ValueError(f"no message of kdq: {kind!r}")
    content = _decoded(content, buffer)
    return makers[kind](content)


def _array(kind: str, dtype: str, shape: list[int], start: int, buffer: memoryview) -> Any:
    of_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    size = int(np.prod(shape, dtype=np.int64)) * of_dtype.itemsize
    array = np.frombuffer(buffer[start : start + size], of_dtype).reshape(shape)
    if kind == "scalar":
        return array[()]
    return jax.device_put(array) if kind == "jax" else array.copy()


def _key(content: list[Any]) -> jax.Array:
    return jax.random.wrap_key_data(content[1], impl=content[0])


def _instance(content: list[Any]) -> Any:
    name, fields = content
    cls = _lookup(name)
    if not (name.startswith("kdq.") and dataclasses.is_dataclass(cls)):
        raise ValueError(f"no message of kdq: the class {name!r}")
    return cls(**fields)


def _error(content: list[Any]) -> Exception:
    name, text, arguments = content
    cls = _lookup(name) if name.startswith(("kdq.", "builtins:")) else None
    if isinstance(cls, type) and issubclass(cls, Exception):
        try:
            return cls(*arguments)
        except TypeError:  # it takes other arguments than it keeps
            pass
    return RuntimeError(f"{name.rpartition(':')[2]}: {text}")


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _lookup(name: str) -> Any:
    """Returns a class of a module that is imported, or None."""
    module, _, path = name.partition(":")
    place: Any = builtins if module == "builtins" else sys.modules.get(module)
    for part in path.split("."):
        place = getattr(place, part, None)
    return place
