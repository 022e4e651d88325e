"""Atomic writes."""

import errno
import os

import pytest

from kdq import files


def test_writes_and_replaces_and_makes_the_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"
    files.write_atomic(path, b"one")
    assert path.read_bytes() == b"one"
    files.write_atomic(str(path), b"two, longer")
    assert path.read_bytes() == b"two, longer"
    assert os.listdir(path.parent) == ["file.bin"]


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    seen = []
    replace = os.replace

    def watch(source, target):
        seen.append((path.read_bytes(), os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    files.write_atomic(path, b"n" * 100_000)
    assert seen == [(b"old", 100_000)]
    assert path.read_bytes() == b"n" * 100_000


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(source, target):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)) as raised:
        files.write_atomic(path, b"new")
    assert isinstance(error, KeyboardInterrupt) or str(path) in str(raised.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_is_as_readable_as_any_file_and_leaves_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files.write_atomic(tmp_path / "file", b"")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
