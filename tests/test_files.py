"""Atomic writes."""

import errno
import hashlib
import json
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


# JSON with a seal.

DOCUMENT = {
    "arm": "kd",
    "seed": 1,
    "accuracy": 0.7125,
    "exports": {"onnx": {"ok": True}},
    "n": None,
}


def test_json_comes_back_without_its_seal(tmp_path):
    path = tmp_path / "a.json"
    for document in (DOCUMENT, {}, [DOCUMENT, {"arm": "x"}], [1, 2], "text"):
        files.write_json(path, document)
        assert files.read_json(path) == document
    files.write_json(path, DOCUMENT, indent=None)
    plain = json.loads(path.read_text())
    assert plain.pop("seal").startswith("sha256:")
    assert plain == DOCUMENT
    # A seal that is there is replaced: records are read by others as plain JSON, and written again.
    files.write_json(path, json.loads(path.read_text()))
    assert files.read_json(path) == DOCUMENT


def test_the_seal_is_of_the_values(tmp_path):
    """SHA-256 of the rest as JSON without blanks, its keys in order: computed here."""
    text = json.dumps(DOCUMENT, sort_keys=True, separators=(",", ":"))
    expected = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    assert files.seal(DOCUMENT)["seal"] == expected


def test_json_without_a_seal_is_read_as_it_is(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(DOCUMENT))
    assert files.read_json(path) == DOCUMENT


def test_no_flipped_bit_is_read_as_another_document(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, DOCUMENT)
    data, messages = path.read_bytes(), []
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            document = files.read_json(path)
        except files.DamagedError as error:
            messages.append(str(error))
        else:
            assert document == DOCUMENT
    assert len(messages) > 0.95 * 8 * len(data)
    assert all(str(path) in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a": "\\ud800"}',
        b'{"seal": "sha256:", "a": NaN}',
        b'{"seal": 5}',
        b"1" * 5000,
    ],
)
def test_what_is_no_json_is_named_in_a_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(files.DamagedError) as raised:
        files.read_json(path)
    assert str(raised.value).startswith(str(path))
    assert len(str(raised.value).splitlines()) == 1


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(files.DamagedError, match="is no regular file"):
            files.read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "nothing")
