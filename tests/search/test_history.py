"""The log of a search: what is damaged in it is made again."""

import json
import logging

import pytest

from kdq import files
from kdq.search.run import Evaluation, History


def evaluation(number):
    return Evaluation(
        policy=(number,),
        chosen={"conv": f"W{number}A8"},
        scores={"kl": number / 8},
        costs={"size": 10.0 * number},
        seconds=0.5,
    )


def written(path, numbers):
    with History(path) as history:
        for number in numbers:
            history.add(evaluation(number))
        return list(history.evaluations)


def test_what_was_logged_is_there_when_it_is_opened_again(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    assert written(path, [1, 2]) == [evaluation(1), evaluation(2)]
    assert written(path, [3]) == [evaluation(1), evaluation(2), evaluation(3)]
    assert all(files.parse(line)["seal"] for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b"0.25", b"0.26"),
        lambda line: line[: len(line) // 2] + b"\n",
        lambda line: b"\xff\n",
        lambda line: b"[" * 100_000 + b"\n",
        lambda line: b"{}\n",
        lambda line: b'{"policy": [2], "chosen": {}, "scores": 5, "costs": {}, "seconds": 1}\n',
    ],
)
def test_from_a_damaged_line_on_all_is_made_again(tmp_path, caplog, damage):
    path = tmp_path / "log.jsonl"
    written(path, [1, 2, 3])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], damage(lines[1]), lines[2]]))
    with caplog.at_level(logging.WARNING, logger="kdq"):
        assert written(path, [2, 3]) == [evaluation(1), evaluation(2), evaluation(3)]
    assert path.read_bytes() == b"".join(lines)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{path}, line 2: damaged (")


def test_a_line_without_a_seal_is_read_and_one_that_was_cut_off_is_not(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    written(path, [1, 2])
    old = [files.unseal(files.parse(line)) for line in path.read_text().splitlines()]
    text = "".join(f"{json.dumps(entry)}\n" for entry in old)
    path.write_text(text + '{"policy": [3], "cho')
    assert written(path, []) == [evaluation(1), evaluation(2)]
    assert path.read_text() == text
    assert not caplog.records
