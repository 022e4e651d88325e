"""launch/prepare_data.py as a user runs it: one process, its output and its exit status."""

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from programs import refusal

SCRIPT = Path(__file__).parents[1] / "launch" / "prepare_data.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def idx_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "idx"
    directory.mkdir()
    for split, count in (("train", 6), ("t10k", 4)):
        images = np.full((count, 28, 28), count, np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.zeros(count, np.uint8))):
            data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            path = directory / f"{split}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(data + array.tobytes()))
    return directory


def test_prepares_what_plain_tfds_reads(tmp_path, idx_dir):
    data_dir = tmp_path / "tfds"
    result = run("--dataset=fashion_mnist", f"--source={idx_dir}", f"--data_dir={data_dir}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"fashion_mnist is prepared in {data_dir}/fashion_mnist/3.0.1\n"
    assert "official train split of fashion_mnist has 60000" in result.stderr
    test = tfds.data_source("fashion_mnist", split="test", data_dir=data_dir, download=False)
    assert [int(example["image"].max()) for example in test] == [4] * 4


def test_user_errors_are_one_line(tmp_path, idx_dir):
    (idx_dir / "t10k-labels-idx1-ubyte.gz").write_bytes(b"not gzip")
    where = f"--source={idx_dir}", f"--data_dir={tmp_path / 'tfds'}"
    answer = refusal("prepare_data", "--dataset=mnist", *where)
    assert answer.startswith("error: ")
    assert "t10k-labels-idx1-ubyte.gz: not a whole gzip file" in answer
    assert "\n" not in answer
    assert not (tmp_path / "tfds").exists()


@pytest.mark.slow
def test_help_says_what_the_files_are_called():
    result = run("--help")
    assert "emnist-CONFIG-{train,test}-{images-idx3,labels-idx1}-ubyte[.gz]" in result.stdout
