"""Training curves on disk, also after an interruption."""

import json

import pytest

from kdq.train.metrics_writer import MetricsWriter


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


def test_a_resume_without_a_file_starts_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [9], after_step=8)
    assert lines(path) == [{"step": 9, "loss": 1.125}]
