"""Checkpoints: what is saved comes back; a damaged one is set aside."""

import contextlib
import errno
import logging
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

from kdq import files
from kdq.train.checkpoint import Checkpointer, CheckpointError
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


# Every bit counts.


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("kdq")]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def check_flips(kept: Path, scratch: Path, flips):
    """Each flipped bit is of no account, or noticed; returns how often either."""
    with Checkpointer(kept) as checkpointer:
        step, trees, record = checkpointer.restore({"state": None})
    seen = {"harmless": 0, "set aside": 0}
    for path, bit in flips:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(kept, scratch)
        flip(scratch / path.relative_to(kept), bit)
        with Checkpointer(scratch) as checkpointer:
            parts = checkpointer.restore({"state": None})
        if parts is None:
            seen["set aside"] += 1
            assert damaged_names(scratch) == [f"{step}.damaged"]
        else:
            seen["harmless"] += 1
            assert parts[0] == step
            assert_equal(parts[1], trees)
            assert parts[2] == record
    return seen


# Orbax leaves its own coroutines behind where it meets what it can't read.
LEFT_BEHIND = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@LEFT_BEHIND
def test_a_flipped_bit_of_any_file_is_noticed_or_of_no_account(tmp_path, caplog):
    saved(tmp_path / "kept", 10)
    flips = [(path, 4 * path.stat().st_size) for path in files_of(tmp_path / "kept")]
    assert len(flips) > 6
    seen = check_flips(tmp_path / "kept", tmp_path / "scratch", flips)
    assert seen["set aside"] > 0


@LEFT_BEHIND
@pytest.mark.slow
def test_no_flipped_bit_becomes_other_weights(net, tmp_path, caplog):
    """150 of them, over all files alike; a twelfth of such flips once became other weights."""
    state = net.state(net.qparams())
    with Checkpointer(tmp_path / "kept") as checkpointer:
        checkpointer.save(10, {"state": state}, RECORD)
    rng, paths = np.random.default_rng(5), files_of(tmp_path / "kept")
    chosen = [paths[i] for i in rng.integers(len(paths), size=150)]
    flips = [(path, int(rng.integers(8 * path.stat().st_size))) for path in chosen]
    seen = check_flips(tmp_path / "kept", tmp_path / "scratch", flips)
    assert seen["set aside"] > 25  # Orbax names its files, and so their order, by chance


def exchange_trees(directory: Path):
    """Sound files, of another step."""
    shutil.rmtree(directory / "10" / "state")
    shutil.copytree(directory / "5" / "state", directory / "10" / "state")


def edit_record(directory: Path):
    path = directory / "10" / "record" / "metadata"
    path.write_text(path.read_text().replace("0.25", "0.26"))


def edit_digests(directory: Path):
    path = directory / "10" / "digests" / "0.json"
    path.write_text(path.read_text().replace('"record":"sha256:', '"record":"sha256;'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (exchange_trees, "is damaged and is set aside: state: a/w has other values than were"),
        (edit_record, "is damaged and is set aside: record: its values are others"),
        (edit_digests, "is set aside: .*0.json is damaged"),
    ],
)
def test_what_is_not_what_was_saved_is_named(tmp_path, caplog, damage, reason):
    saved(tmp_path, 5, 10)
    damage(tmp_path)
    with caplog.at_level(logging.WARNING, logger="kdq"):
        step, trees, record = restored(tmp_path)
    assert (step, record["at"]) == (5, 5)
    assert_equal(trees["state"], tree(5))
    (message,) = messages(caplog)
    assert re.search(reason, message), message


@pytest.mark.parametrize(
    "text", ["5", "[]", '{"item_handlers": 5}', '{"init_timestamp_nsecs": "x"}', '{"metrics": 3}']
)
def test_a_damaged_description_is_no_hindrance_to_the_others(tmp_path, caplog, text):
    saved(tmp_path, 5, 10)
    (tmp_path / "10" / "_CHECKPOINT_METADATA").write_text(text)
    with caplog.at_level(logging.WARNING, logger="kdq"):
        step, trees, _ = restored(tmp_path)
    assert step == 5
    assert_equal(trees["state"], tree(5))
    assert damaged_names(tmp_path) == ["10.damaged"]
    (message,) = messages(caplog)
    assert f"checkpoint {tmp_path / '10'} can't be read and is set aside: " in message


def test_a_checkpoint_from_before_there_were_digests_opens(tmp_path):
    saved(tmp_path, 5)
    shutil.rmtree(tmp_path / "5" / "digests")
    step, trees, record = restored(tmp_path)
    assert (step, record["at"]) == (5, 5)
    assert_equal(trees["state"], tree(5))


def test_a_newer_format_is_not_damaged(tmp_path):
    saved(tmp_path, 5)
    path = tmp_path / "5" / "digests" / "0.json"
    files.write_json(path, {**files.read_json(path), "format": 2})
    with pytest.raises(CheckpointError, match=r"5 is of format 2, and this .* reads up to 1"):
        restored(tmp_path)
    assert os.listdir(tmp_path) == ["5"]


def test_what_a_newer_orbax_saved_is_not_damaged(tmp_path):
    saved(tmp_path, 5)
    path = tmp_path / "5" / "digests" / "0.json"
    files.write_json(path, {**files.read_json(path), "orbax": "99.1.0"})
    assert restored(tmp_path)[0] == 5  # which may be as it was
    garbage(tmp_path / "5" / "state")
    with pytest.raises(CheckpointError, match=r"saved by Orbax 99.1.0, and Orbax .* can't read it"):
        restored(tmp_path)
    assert os.listdir(tmp_path) == ["5"]


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(errno.EACCES, "no")])
def test_what_no_checkpoint_is_to_blame_for_is_raised(tmp_path, monkeypatch, error):
    saved(tmp_path, 5)

    def fail(*args, **kwargs):
        raise error

    with Checkpointer(tmp_path) as checkpointer, monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
        with pytest.raises(type(error)):
            checkpointer.restore({"state": None})
    assert restored(tmp_path)[0] == 5


# The disk is full; somebody presses Ctrl-C.


@contextlib.contextmanager
def file_size(limit: int):
    """No file of this process may be longer: writing fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_half_way_is_one_error_and_no_checkpoint(tmp_path, capfd):
    large = {"w": np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"state": tree(1)}, RECORD)
    checkpointer.wait()
    with file_size(16384):
        checkpointer.save(2, {"state": large}, RECORD)
        with pytest.raises(OSError, match="File too large") as raised:
            checkpointer.wait()
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(tmp_path)
    with contextlib.suppress(OSError):
        checkpointer.close()
    assert "Traceback" not in capfd.readouterr().err
    assert restored(tmp_path)[0] == 1
    saved(tmp_path, 2)
    assert restored(tmp_path)[0] == 2


@pytest.mark.parametrize("method", ["save", "close"])
def test_ctrl_c_waits_for_a_save(tmp_path, monkeypatch, method):
    whole = getattr(orbax.checkpoint.CheckpointManager, method)
    done = []

    def press(manager, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        done.append(whole(manager, *args, **kwargs))

    monkeypatch.setattr(orbax.checkpoint.CheckpointManager, method, press)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 5)
    monkeypatch.undo()
    assert done
    assert restored(tmp_path)[0] == 5
