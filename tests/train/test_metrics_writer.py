"""Training curves on disk, also after an interruption."""

import contextlib
import json
import logging
import struct
import sys

import pytest
from tensorboardX.proto import event_pb2

from kdq.fields import ConfigError
from kdq.train.metrics_writer import MetricsWriter, tensorboard


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path, steps, **kwargs):
    writer = MetricsWriter(path, **kwargs)
    for step in steps:
        writer.write(step, {"loss": step / 8})
    writer.close()


def test_a_line_an_entry(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2])
    assert path.read_text() == '{"step": 1, "loss": 0.125}\n{"step": 2, "loss": 0.25}\n'


def test_an_entry_is_on_disk_when_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(1, {"loss": 0.5})
    assert lines(path) == [{"step": 1, "loss": 0.5}]
    writer.close()


def test_a_fresh_start_forgets_what_was_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2, 3])
    written(path, [1])
    assert [entry["step"] for entry in lines(path)] == [1]


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', '{"step": 2, "loss": 1'])
def test_a_resume_drops_later_and_cut_off_lines(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2, 2, 3, 4])
    path.write_text(path.read_text() + tail)
    written(path, [3, 4, 5], after_step=2)
    assert [entry["step"] for entry in lines(path)] == [1, 2, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


DAMAGED = (
    b'{"step": 2, "lo', b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"5", b'{"loss": 1}',
    b'{"step": "2"}', b'{"step": 2, "loss": "x"}', b'{"step": 2, "loss": NaN}',
)  # fmt: skip


def test_a_resume_leaves_out_damaged_lines_and_says_so(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2, 3])
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\n".join(DAMAGED) + b"\n" + b"".join(others))
    with caplog.at_level(logging.WARNING, logger="kdq"):
        written(path, [3, 4], after_step=2)
    assert [entry["step"] for entry in lines(path)] == [1, 2, 3, 4]
    (message,) = [r.getMessage() for r in caplog.records]
    assert message == f"{path}: {len(DAMAGED)} damaged lines are left out"


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer._file.close()
    writer._file = open("/dev/full", "w")  # noqa: SIM115 closed by the writer
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        writer.write(1, {"loss": 0.5})
    with contextlib.suppress(OSError):  # what it could not write is written again
        writer.close()


def test_a_resume_without_a_file_starts_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [9], after_step=8)
    assert lines(path) == [{"step": 9, "loss": 1.125}]


def events(folder):
    """{(name, step): value} of all records of TensorBoard's files, and how many there are."""
    found = []
    for path in folder.iterdir():
        data, place = path.read_bytes(), 0
        while place < len(data):  # length, its checksum, an event, its checksum
            (length,) = struct.unpack_from("<Q", data, place)
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
            found += [((v.tag, event.step), v.simple_value) for v in event.summary.value]
            place += 16 + length
    return dict(found), len(found)


def test_events_are_the_lines_also_after_a_resume(tmp_path):
    path, folder = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    written(path, [1, 2, 3], events=folder)
    written(path, [3, 4], after_step=2, events=folder)
    expected = {("loss", entry["step"]): entry["loss"] for entry in lines(path)}
    assert sorted(step for _, step in expected) == [1, 2, 3, 4]
    assert events(folder) == (expected, 4)


def test_events_need_an_extra_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'kdq\[tensorboard\]'"):
        tensorboard()
    written(tmp_path / "metrics.jsonl", [1])  # lines need none
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.125}]
