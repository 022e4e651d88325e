"""Small data sets for the tests of kdq.data."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdq.data import Source, open_split


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def make_arrays(count: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 28, 28), np.uint8)
    return images, (np.arange(count) % num_classes).astype(np.uint8)


@pytest.fixture
def write_idx(tmp_path: Path) -> Callable[..., dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Writes the four files of a data set into tmp_path / "idx"; returns the arrays by split."""

    def write(dataset: str = "mnist", num_classes: int = 10, compress: bool = True):
        directory = tmp_path / "idx"
        directory.mkdir(exist_ok=True)
        arrays = {
            "train": make_arrays(23, num_classes, seed=0),
            "test": make_arrays(11, num_classes, seed=1),
        }
        _, _, config = dataset.partition("/")
        for split, (images, labels) in arrays.items():
            stem = (
                f"emnist-{config}-{split}" if config else {"train": "train", "test": "t10k"}[split]
            )
            for name, array in (("images-idx3", images), ("labels-idx1", labels)):
                data = idx_bytes(array)
                path = directory / f"{stem}-{name}-ubyte{'.gz' if compress else ''}"
                path.write_bytes(gzip.compress(data, 1) if compress else data)
        return arrays

    return write


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="session")
def digits(digits_dir: Path) -> Source:
    return open_split("digits", "validation", data_dir=digits_dir)


@pytest.fixture(scope="session")
def digits_by_record(digits_dir: Path) -> Source:
    return open_split("digits", "validation", data_dir=digits_dir, in_memory=False)
