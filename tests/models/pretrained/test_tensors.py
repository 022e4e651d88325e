"""Files of tensors are read as they were written, and nothing in them is run."""

import dataclasses
import io
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from kdq.models.pretrained import TensorFileError, read_tensors

ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "conv.bias": np.array([1.5, -2], np.float32),
    "steps": np.array(7, np.int64),
}


# What PyTorch's pickles name, without PyTorch: only their names are written.
TORCH, UTILS = types.ModuleType("torch"), types.ModuleType("torch._utils")
for kind in ("FloatStorage", "LongStorage"):
    setattr(TORCH, kind, type(kind, (), {"__module__": "torch"}))
exec("def _rebuild_tensor_v2(): ...", vars(UTILS))


@dataclasses.dataclass
class Storage:
    kind: str
    key: str
    size: int


@dataclasses.dataclass
class Tensor:
    """A view of a storage, pickled as PyTorch does it."""

    storage: Storage
    shape: tuple
    strides: tuple
    offset: int = 0

    def __reduce__(self):
        arguments = (self.storage, self.offset, self.shape, self.strides, False, {})
        return UTILS._rebuild_tensor_v2, arguments


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return "storage", getattr(TORCH, value.kind), value.key, "cpu", value.size
        return None


@pytest.fixture(autouse=True)
def torch_names(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", TORCH)
    monkeypatch.setitem(sys.modules, "torch._utils", UTILS)


def dump(tree):
    file = io.BytesIO()
    Pickler(file, 2).dump(tree)
    return file.getvalue()


def tree_of(arrays):
    kinds = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}
    return {
        name: Tensor(
            Storage(kinds[array.dtype], str(i), array.size),
            array.shape,
            tuple(stride // array.itemsize for stride in array.strides),
        )
        for i, (name, array) in enumerate(arrays.items())
    }


def save_zip(path, tree, numbers):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", dump(tree))
        archive.writestr("m/byteorder", "little")
        for key, data in numbers.items():
            archive.writestr(f"m/data/{key}", data)


def save_legacy(path, tree, numbers):
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, tree, list(numbers)]
    with path.open("wb") as file:
        for part in parts:
            file.write(dump(part))
        sizes = {tensor.storage.key: tensor.storage.size for tensor in tree.values()}
        for key, data in numbers.items():
            file.write(struct.pack("<q", sizes[key]) + data)


@pytest.fixture(params=["zip", "legacy"])
def save(request):
    return {"zip": save_zip, "legacy": save_legacy}[request.param]


def numbers_of(arrays):
    return {str(i): array.tobytes() for i, array in enumerate(arrays.values())}


def test_both_layouts_of_pytorch(tmp_path, save):
    save(tmp_path / "m.pth", tree_of(ARRAYS), numbers_of(ARRAYS))
    read = read_tensors(tmp_path / "m.pth")
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def test_tensors_in_mappings_and_lists_have_dots_in_their_names(tmp_path):
    (tensor,) = tree_of({"x": np.ones(2, np.float32)}).values()
    tree = {"epoch": 3, "state": {"conv": {"bias": tensor}, "steps": [tensor], "note": "text"}}
    save_zip(tmp_path / "m.pth", tree, {"0": np.ones(2, np.float32).tobytes()})
    assert list(read_tensors(tmp_path / "m.pth")) == ["state.conv.bias", "state.steps.0"]


def test_views_of_a_storage_have_its_strides_and_offset(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    view = Tensor(Storage("FloatStorage", "0", 12), (2, 3), (1, 4), offset=1)
    save_zip(tmp_path / "m.pth", {"view": view}, {"0": array.tobytes()})
    np.testing.assert_array_equal(read_tensors(tmp_path / "m.pth")["view"], array[:, 1:3].T)


def test_safetensors_and_npz(tmp_path):
    save_file(ARRAYS, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz", **ARRAYS)
    for name in ("m.safetensors", "m.npz"):
        read = read_tensors(tmp_path / name)
        for key, array in ARRAYS.items():
            np.testing.assert_array_equal(read[key], array)


def test_code_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({"weight": Evil()}, 2))
    with pytest.raises(TensorFileError, match=r"asks for \w+\.open, which is code"):
        read_tensors(tmp_path / "m.pth")
    assert not ran.exists()


@pytest.mark.parametrize("strides", [(1000, 1), (-1, 1)])
def test_a_view_beyond_its_storage_is_refused(tmp_path, strides):
    tree = {"weight": Tensor(Storage("FloatStorage", "0", 12), (3, 4), strides)}
    save_zip(tmp_path / "m.pth", tree, {"0": np.zeros(12, np.float32).tobytes()})
    with pytest.raises(TensorFileError, match="larger than its storage"):
        read_tensors(tmp_path / "m.pth")


def test_cut_off_files_are_refused_in_one_line(tmp_path, save):
    save(tmp_path / "m.pth", tree_of(ARRAYS), numbers_of(ARRAYS))
    whole = (tmp_path / "m.pth").read_bytes()
    for length in (0, 10, len(whole) // 3, len(whole) // 2, len(whole) - 3):
        (tmp_path / "m.pth").write_bytes(whole[:length])
        with pytest.raises(TensorFileError) as caught:
            read_tensors(tmp_path / "m.pth")
        assert "\n" not in str(caught.value)
