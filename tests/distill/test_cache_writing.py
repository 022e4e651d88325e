"""A cache is written whole, once, by one process, and of batches that fit, or not at all."""

import subprocess
import sys
import threading
from concurrent import futures

import numpy as np
import pytest
from caches import BY_ID, CLASSES, KEY, LENGTH, LOGITS, batches, write

from kdq.distill.cache import CacheError, write_cache


def broken_off(key, count):
    for number, batch in enumerate(batches(key)):
        if number == count:
            raise KeyboardInterrupt
        yield batch


@pytest.mark.parametrize("count", [0, 2, 4])
def test_an_interrupted_write_leaves_nothing(tmp_path, count):
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cache", BY_ID, broken_off(BY_ID, count), LENGTH)
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(write(tmp_path / "cache").load()["logits"], LOGITS)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
import caches as t

def killed():
    yield from list(t.batches(t.BY_ID))[:4]
    os._exit(9)

t.write_cache(sys.argv[1], t.BY_ID, killed(), t.LENGTH)
"""


@pytest.mark.slow
def test_a_killed_write_leaves_nothing_under_the_final_name(tmp_path, request):
    here = str(request.path.parent)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cache"), here]
    assert subprocess.run(command).returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name == ".cache.partial"
    assert sorted(p.name for p in left.iterdir()) == ["lock", "records.npy"]
    (left / "00000-of-00001.array_record").touch()  # of another version
    write(tmp_path / "cache")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    names = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert names == ["metadata.json", "records.npy"]


@pytest.mark.parametrize("finishes", [True, False])
def test_a_second_writer_waits_for_the_first_and_uses_what_it_wrote(tmp_path, finishes):
    cache = tmp_path / "cache"
    at_work, go_on = threading.Event(), threading.Event()

    def slowly():
        at_work.set()
        assert go_on.wait(60)
        if not finishes:
            raise OSError("the disk is full")
        yield from batches(BY_ID)

    with futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(write_cache, cache, BY_ID, slowly(), LENGTH)
        assert at_work.wait(60)
        left = batches(BY_ID) if not finishes else broken_off(BY_ID, 0)
        second = pool.submit(write_cache, cache, BY_ID, left, LENGTH)
        assert not futures.wait([second], 0.3).done
        go_on.set()
        assert len(second.result(60)) == LENGTH
        assert (first.exception() is None) == finishes
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_an_equal_cache_is_reused_and_another_length_is_not(tmp_path):
    write(tmp_path / "cache")
    untouched = broken_off(BY_ID, 0)  # raises when asked for a batch
    opened = write_cache(tmp_path / "cache", BY_ID, untouched, LENGTH)
    np.testing.assert_array_equal(opened.load()["logits"], LOGITS)
    with pytest.raises(CacheError, match=r"length: expected 24, found 23.*in the way"):
        write_cache(tmp_path / "cache", BY_ID, untouched, 24)
    (tmp_path / "cache" / "records.npy").unlink()
    with pytest.raises(CacheError, match=r"is missing\. It is in the way"):
        write(tmp_path / "cache")


def changed(key, change):
    """The batches of a key, the third one changed."""
    return [change(b) if i == 2 else b for i, b in enumerate(batches(key))]


def put(name, array):
    return lambda batch: {**batch, name: array}


@pytest.mark.parametrize(
    ("key", "change", "pattern"),
    [
        (BY_ID, lambda b: {"id": b["id"]}, r"has the arrays \['id'\], must have"),
        (KEY, lambda b: {**b, "id": b["id"] + 2**32}, "id is int64"),
        (BY_ID, lambda b: {**b, "id": b["id"][::-1]}, r"id \[14 .*must go on from 10"),
        (BY_ID, lambda b: {**b, "id": b["id"] + 1}, "must go on from 10 without a gap"),
        (KEY, lambda b: {**b, "position": b["position"] + 1}, r"position \[11 .* from 10"),
        (KEY, lambda b: {**b, "id": b["id"] + 0.5}, "id is float64"),
        (BY_ID, put("logits", np.zeros((5, CLASSES))), "logits is float64.*must be float32"),
        (BY_ID, put("logits", np.zeros((4, CLASSES), np.float32)), r"\(4, 5\), must be float32"),
        (BY_ID, put("logits", np.full((5, CLASSES), np.nan, np.float32)), "not finite.* id 10"),
        (KEY, put("log_probs", np.full((5, 2), -np.inf, np.float32)), "log_probs is not finite"),
        (KEY, put("indices", np.full((5, 2), CLASSES, np.int32)), r"indices must be in \[0, 5\)"),
    ],
)
def test_batches_that_do_not_fit_are_refused(tmp_path, key, change, pattern):
    with pytest.raises(CacheError, match=pattern):
        write_cache(tmp_path / "cache", key, changed(key, change), LENGTH)
    assert list(tmp_path.iterdir()) == []
