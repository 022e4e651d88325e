"""Checkpoints: what is saved comes back; a damaged one is set aside."""

import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.train.checkpoint import Checkpointer
from kdq.train.objective import Objective

RECORD = {"selected": {"step": 3, "metrics": {"nll": 0.25}}, "data": {"next_index": 7}}


def tree(value):
    return {"a": {"w": jnp.full((3, 2), value, jnp.float32)}, "n": jnp.int32(value), "none": {}}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


def saved(directory, *steps):
    with Checkpointer(directory) as checkpointer:
        for step in steps:
            checkpointer.save(step, {"state": tree(step)}, {**RECORD, "at": step})
        checkpointer.wait()


def restored(directory):
    with Checkpointer(directory) as checkpointer:
        return checkpointer.restore({"state": tree(0)})


def test_a_training_state_comes_back_bit_for_bit(net, tmp_path):
    state = net.state(net.qparams())
    state, _ = net.step(state, net.batch(0), Objective())
    trees = {"state": state, "selected": {"params": state.params, "scales": state.scales}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, trees, RECORD)
        like = {"state": net.state(net.qparams(), seed=5), "selected": trees["selected"]}
        step, found, record = checkpointer.restore(like)
    assert step == 1
    assert record == RECORD
    assert_equal(found, trees)
    # And what was restored trains on like what was saved.
    on, _ = net.step(found["state"], net.batch(1), Objective())
    straight, _ = net.step(state, net.batch(1), Objective())
    assert_equal(on, straight)


def test_saving_copies_what_the_next_step_donates(net, tmp_path):
    state = net.state()
    kept = jax.tree.map(np.array, state.params)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": state.params}, {})
        net.step(state, net.batch(0), Objective())
        _, found, _ = checkpointer.restore({"params": kept})
    assert_equal(jax.tree.map(np.asarray, found["params"]), kept)


def test_without_a_pattern_nested_dicts_come_back(tmp_path):
    saved(tmp_path, 4)
    with Checkpointer(tmp_path) as checkpointer:
        _, found, _ = checkpointer.restore({"state": None})
    np.testing.assert_array_equal(found["state"]["a"]["w"], np.full((3, 2), 4, np.float32))
    assert found["state"]["n"] == 4


def test_the_newest_counts_and_two_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "2"]
    step, trees, record = restored(tmp_path)
    assert (step, record["at"]) == (10, 10)
    assert_equal(trees["state"], tree(10))


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    saved(tmp_path, 1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"state": tree(9)}, {"at": 9})
    assert restored(tmp_path)[2]["at"] == 1


def test_nothing_saved_is_none(tmp_path):
    assert restored(tmp_path / "new") is None


def truncate(folder: Path):
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size:
            os.truncate(file, file.stat().st_size // 2)


def garbage(folder: Path):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"\xde\xad\xbe\xef" * 16)


def empty(folder: Path):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def remove_arrays(folder: Path):
    shutil.rmtree(folder / "state")


def damaged_names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if "damaged" in p.name)


@pytest.mark.parametrize("damage", [truncate, garbage, empty, remove_arrays])
def test_a_damaged_checkpoint_is_named_set_aside_and_its_predecessor_used(tmp_path, caplog, damage):
    saved(tmp_path, 5, 10)
    damage(tmp_path / "10")
    with caplog.at_level(logging.WARNING, logger="kdq"):
        step, trees, record = restored(tmp_path)
    assert (step, record["at"]) == (5, 5)
    assert_equal(trees["state"], tree(5))
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("kdq")]
    assert len(messages) == 1
    assert f"checkpoint {tmp_path / '10'} can't be read and is set aside" in messages[0]
    assert damaged_names(tmp_path) == ["10.damaged"]
    assert not (tmp_path / "10").exists()
    # The step can be written again, and counts again.
    saved(tmp_path, 10)
    assert restored(tmp_path)[0] == 10


def test_a_step_that_is_damaged_twice_is_set_aside_twice(tmp_path, caplog):
    saved(tmp_path, 5, 10)
    garbage(tmp_path / "10")
    restored(tmp_path)
    saved(tmp_path, 10)
    garbage(tmp_path / "10")
    assert restored(tmp_path)[0] == 5
    assert len(damaged_names(tmp_path)) == 2


def test_all_damaged_is_none(tmp_path, caplog):
    saved(tmp_path, 5, 10)
    garbage(tmp_path / "5")
    garbage(tmp_path / "10")
    assert restored(tmp_path) is None
    assert damaged_names(tmp_path) == ["10.damaged", "5.damaged"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            "RESOURCE_EXHAUSTED: ...: No space left on device [os_error_code='28'] [tensorstore_",
            OSError,
            "No space left on dev",
        ),
        ("something else", ValueError, "something else"),
    ],
)
def test_a_full_disk_is_said_in_a_line(tmp_path, monkeypatch, error, kind, message):
    """TensorStore's own error, shortened: it goes on for kilobytes."""

    def fail(manager):
        raise ValueError(error)

    with Checkpointer(tmp_path) as checkpointer, monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.wait_until_finished", fail)
        with pytest.raises(kind, match=message) as raised:
            checkpointer.wait()
    assert kind is not OSError or raised.value.filename == str(tmp_path)
