"""Named arrays from files that other libraries wrote; nothing in a file is executed."""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from kdq.fields import Mistake

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# The number that files of PyTorch before 1.6 begin with, and the version of their layout.
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)


class TensorFileError(Mistake, ValueError):
    """A file that can't be read as named arrays; the message says why."""


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by name, `{"conv.weight": ...}`.

    Args:
      path: of a safetensors file (".safetensors"), of NumPy's (".npz"), or else one that PyTorch
        saved (".pth", ".pt", ".bin"), of which nothing is executed: it may hold tensors in
        mappings and lists, whose keys are joined by dots; numbers and texts are left out.

    Raises:
      TensorFileError: another file, a damaged one, or one that asks for code to be run.
      OSError: it can't be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file  # noqa: PLC0415

            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        with path.open("rb") as file:
            tree = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
    except (OSError, TensorFileError):
        raise
    except Exception as error:  # readers raise almost anything for a damaged file
        raise TensorFileError(f"{path} can't be read as arrays: {error}") from error
    arrays = dict(_flatten(tree))
    if not arrays:
        raise TensorFileError(f"{path} holds no tensors")
    return arrays


class _Storage(NamedTuple):
    """Numbers in a file, which tensors are views of."""

    key: str
    dtype: Any
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, as PyTorch describes it; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, numbers: np.ndarray) -> np.ndarray:
        """Returns a copy of the numbers that it is a view of."""
        steps = [stride * (size - 1) for stride, size in zip(self.strides, self.shape, strict=True)]
        last = self.offset + sum(steps)
        is_inside = min((self.offset, *self.strides, *self.shape)) >= 0 and last < len(numbers)
        if 0 not in self.shape and not is_inside:
            raise TensorFileError(f"a tensor of shape {self.shape} is larger than its storage")
        strides = [stride * numbers.itemsize for stride in self.strides]
        start = numbers[self.offset :]
        return np.lib.stride_tricks.as_strided(start, self.shape, strides).copy()


class _Unpickler(pickle.Unpickler):
    """Reads mappings of tensors, and refuses to make or call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, strides, *_: _Tensor(
                storage, offset, tuple(shape), tuple(strides)
            )
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise TensorFileError(
            f"it asks for {module}.{name}, which is code, not a tensor: save the state_dict alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *_ = pid
        if kind != "storage":
            raise TensorFileError(f"it refers to a {kind!r}")
        return _Storage(str(key), np.dtype(dtype), int(size))


def _read_zip(file: BinaryIO) -> Any:
    """Returns the tree of arrays of a file of PyTorch 1.6 or later."""
    with zipfile.ZipFile(file) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = index.removesuffix("data.pkl")
        if (
            f"{root}byteorder" in archive.namelist()
            and archive.read(f"{root}byteorder") != b"little"
        ):
            raise TensorFileError("its numbers are big-endian")
        tree = _Unpickler(io.BytesIO(archive.read(index))).load()
        read = lambda storage: archive.read(f"{root}data/{storage.key}")
        return _fill(tree, read)


def _read_legacy(file: BinaryIO) -> Any:
    """Returns the tree of arrays of a file of PyTorch before 1.6."""
    file.seek(0)
    if tuple(_Unpickler(file).load() for _ in _LEGACY) != _LEGACY:
        raise TensorFileError("it is no file of PyTorch's")
    if not _Unpickler(file).load()["little_endian"]:
        raise TensorFileError("its numbers are big-endian")
    tree = _Unpickler(file).load()
    sizes = {t.storage.key: t.storage for t in _tensors(tree)}
    numbers = {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        numbers[key] = file.read(count * sizes[key].dtype.itemsize)
    return _fill(tree, lambda storage: numbers[storage.key])


def _fill(tree: Any, read: Callable[[_Storage], bytes]) -> Any:
    """Returns a tree with arrays in place of the tensors that were described."""
    numbers: dict[str, np.ndarray] = {}
    for tensor in _tensors(tree):
        storage = tensor.storage
        if storage.key not in numbers:
            numbers[storage.key] = np.frombuffer(read(storage), storage.dtype)
            if len(numbers[storage.key]) != storage.size:
                raise TensorFileError(f"storage {storage.key} is cut off")

    def fill(node: Any) -> Any:
        if isinstance(node, _Tensor):
            return node.view(numbers[node.storage.key])
        if isinstance(node, Mapping):
            return {str(key): fill(value) for key, value in node.items()}
        return [fill(value) for value in node] if isinstance(node, list | tuple) else node

    return fill(tree)


def _tensors(tree: Any) -> list[_Tensor]:
    if isinstance(tree, _Tensor):
        return [tree]
    if not isinstance(tree, Mapping | list | tuple):
        return []
    children = tree.values() if isinstance(tree, Mapping) else tree
    return [tensor for child in children for tensor in _tensors(child)]


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, np.ndarray]]:
    if isinstance(tree, np.ndarray):
        return [(prefix, tree)]
    if not isinstance(tree, Mapping | list):
        return []
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    join = lambda key: f"{prefix}.{key}" if prefix else str(key)
    return [entry for key, value in items for entry in _flatten(value, join(key))]
