"""Caches of teacher logits: what was written comes back, and anything else is refused by name."""

import dataclasses
import json
import os
from concurrent import futures

import numpy as np
import pytest
from caches import BY_ID, CLASSES, IDS, KEY, LENGTH, LOGITS, SAMPLED, TOP_K, batches, write

from kdq import files
from kdq.distill.cache import CacheError, open_cache, write_cache
from kdq.distill.cache_key import CacheKey, Dense, TopK


def expected_arrays(target, positions):
    """What the kinds should hold, for the records at `positions`, from float64 loops."""
    result = {"logits": LOGITS[positions]} if isinstance(target, Dense) else {}
    if isinstance(target, TopK):
        p = np.exp(LOGITS[positions].astype(np.float64) / 4)
        p /= p.sum(-1, keepdims=True)
        order = np.argsort(-p, axis=-1)[:, :2]
        result = {"indices": order, "log_probs": np.log(np.take_along_axis(p, order, -1))}
    return result


@pytest.mark.parametrize("target", [Dense(), TOP_K, SAMPLED], ids=lambda t: t.kind)
@pytest.mark.parametrize("by_position", [False, True])
def test_round_trip(tmp_path, target, by_position):
    key = dataclasses.replace(KEY if by_position else BY_ID, target=target)
    write(tmp_path / "deep" / "cache", key)
    opened = open_cache(tmp_path / "deep" / "cache", key)
    assert len(opened) == LENGTH
    indices = np.array([22, 0, 7, 8, 7, 16])
    ids = IDS[indices] if by_position else indices
    got, everything = opened.read(indices, ids), opened.load()
    np.testing.assert_array_equal(got["id"], ids)
    for name, array in everything.items():
        assert array.shape[0] == LENGTH
        assert array.dtype == got[name].dtype
        np.testing.assert_array_equal(array[indices], got[name])
    for name, array in expected_arrays(target, indices).items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, err_msg=name)
    if target is SAMPLED:  # each weight is p / (3 r) with r ∝ p^0.7
        p = np.exp(LOGITS[indices].astype(np.float64) / 4)
        p /= p.sum(-1, keepdims=True)
        r = p**0.7 / (p**0.7).sum(-1, keepdims=True)
        weights = np.take_along_axis(p / r / 3, got["indices"], -1)
        np.testing.assert_allclose(got["weights"], weights, rtol=1e-5)
    assert set(got) == {"id", *(name for name, _, _ in target.layout(CLASSES))}


def test_dense_values_come_back_bit_for_bit_and_are_the_callers(tmp_path):
    opened = write(tmp_path / "cache")
    logits = opened.load()["logits"]
    assert logits.tobytes() == LOGITS.tobytes()
    logits[:] = 0
    read = opened.read([3])["logits"]
    read[:] = 1
    np.testing.assert_array_equal(opened.read([3])["logits"], LOGITS[[3]])
    assert opened.read(np.array([], np.int32))["logits"].shape == (0, CLASSES)


# Another value for every field: a new field without one fails the tests below.
OTHER = {
    "teacher": "another teacher",
    "teacher_model": {"name": "cnn", "widths": (4, 9)},
    "dataset": "mnist",
    "split": "train[:90%]",
    "data_digest": "other data",
    "mean": 5.0,
    "std": (6.0, 6.0, 6.0),
    "augment": ({"name": "shift", "pixels": 2},),
    "stream_seed": 1,
    "num_classes": CLASSES + 1,
}
OTHER_TARGET = {
    "k": (TOP_K, 3),
    "temperature": (TOP_K, 4.5),
    "samples": (SAMPLED, 4),
    "sampling_seed": (SAMPLED, 1),
    "proposal_temperature": (SAMPLED, 1.0),
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(CacheKey)])
def test_every_field_of_the_key_that_differs_is_named(tmp_path, field):
    write(tmp_path / "cache", KEY)
    if field == "target":
        other, field = dataclasses.replace(KEY, target=Dense()), "kind"
        pattern = "kind: expected 'dense', found 'top_k'"
    else:
        other = dataclasses.replace(KEY, **{field: OTHER[field]})
        pattern = f"something else: {field}: expected "
    with pytest.raises(CacheError, match=pattern) as error:
        open_cache(tmp_path / "cache", other)
    assert str(tmp_path / "cache") in str(error.value)
    assert repr(KEY.to_json()[field]) in str(error.value)
    assert repr(other.to_json()[field]) in str(error.value)
    with pytest.raises(CacheError, match=f"{pattern}.*in the way: remove it"):
        write(tmp_path / "cache", other)
    open_cache(tmp_path / "cache", KEY)


@pytest.mark.parametrize(
    ("target", "field"),
    [(t, f.name) for t in (Dense(), TOP_K, SAMPLED) for f in dataclasses.fields(t)],
)
def test_every_field_of_the_target_that_differs_is_named(tmp_path, target, field):
    key = dataclasses.replace(BY_ID, target=target)
    write(tmp_path / "cache", key)
    base, value = OTHER_TARGET[field]
    if field == "temperature":
        base = target
    other = dataclasses.replace(key, target=dataclasses.replace(base, **{field: value}))
    expected = f"something else: {field}: expected {value}, found {getattr(target, field)}$"
    with pytest.raises(CacheError, match=expected):
        open_cache(tmp_path / "cache", other)


def test_all_differences_are_named_at_once(tmp_path):
    write(tmp_path / "cache", KEY)
    with pytest.raises(CacheError, match=r"augment: expected .*; split: expected .*; stream_seed"):
        open_cache(
            tmp_path / "cache",
            dataclasses.replace(KEY, split="test", augment=(), stream_seed=None),
        )


def test_every_damage_is_named(tmp_path):
    directory = tmp_path / "cache"
    write(directory)
    path = directory / "records.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=f"{path} has {len(whole) - 1} bytes, not {len(whole)}"):
        open_cache(directory, BY_ID)
    for place in (0, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CacheError, match=f"{path} is damaged"):
            open_cache(directory, BY_ID)
    size = 4 + 4 * CLASSES
    path.write_bytes(whole[:-size] + whole[-2 * size : -size])  # a record twice
    with pytest.raises(CacheError, match=f"{path} is damaged"):
        open_cache(directory, BY_ID)
    path.unlink()
    with pytest.raises(CacheError, match=f"{path} is missing"):
        open_cache(directory, BY_ID)
    path.write_bytes(whole)
    open_cache(directory, BY_ID)
    (directory / "metadata.json").unlink()
    with pytest.raises(CacheError, match=r"there is no metadata\.json"):
        open_cache(directory, BY_ID)
    with pytest.raises(CacheError, match="no cache in"):
        open_cache(tmp_path / "elsewhere", BY_ID)


def test_no_damage_of_the_metadata_goes_unseen(tmp_path):
    directory = tmp_path / "cache"
    write(directory)
    path = directory / "metadata.json"
    text = path.read_text()
    for place in range(len(text)):
        if text[place].isspace():
            continue  # not all of it matters
        path.write_text(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :])
        with pytest.raises(CacheError, match=str(directory)):
            open_cache(directory, BY_ID)
    path.write_bytes(b"\xff" + text.encode())
    with pytest.raises(CacheError, match=r"metadata\.json can't be read as JSON"):
        open_cache(directory, BY_ID)


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_is_refused_as_such(tmp_path, version):
    write(tmp_path / "cache")
    path = tmp_path / "cache" / "metadata.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({"format": version, "contents": metadata["key"]}))
    words = f"format {version}; this version reads 2: delete it"
    with pytest.raises(CacheError, match=words):
        open_cache(tmp_path / "cache", BY_ID)
    with pytest.raises(CacheError, match=f"{words}.*in the way"):
        write(tmp_path / "cache")


def test_an_array_of_another_length_is_refused(tmp_path):
    write(tmp_path / "cache")
    path = tmp_path / "cache" / "metadata.json"
    files.write_json(path, {**json.loads(path.read_text()), "length": LENGTH + 1})
    with pytest.raises(CacheError, match=rf"damaged: its length is not \({LENGTH},\)"):
        open_cache(tmp_path / "cache", BY_ID)


def test_the_number_of_examples_must_be_the_length(tmp_path):
    directory = tmp_path / "cache"
    for length, found in ((22, "23 examples or more"), (20, "23 examples or more"), (24, "23 ex")):
        with pytest.raises(CacheError, match=f"{found}.*length is {length}"):
            write_cache(directory, BY_ID, batches(BY_ID), length)
    # A stream has no end: it is cut, in the middle of a batch.
    opened = write_cache(directory, KEY, batches(KEY), 11)
    np.testing.assert_array_equal(opened.load()["id"], IDS[:11])
    with pytest.raises(CacheError, match="have 23 examples, length is 24"):
        write_cache(tmp_path / "longer", KEY, batches(KEY), 24)


def test_positions_are_read_with_their_examples_ids_alone(tmp_path):
    opened = write(tmp_path / "cache", KEY)
    with pytest.raises(ValueError, match="ids must be given"):
        opened.read([0, 1])
    with pytest.raises(CacheError, match=f"record 4 is of example {IDS[4]}, not of {IDS[5]}"):
        opened.read([3, 4], IDS[[3, 5]])
    with pytest.raises(ValueError, match=r"ids \(1,\) must be one for each of the indices \(2,\)"):
        opened.read([3, 3], IDS[[3]])
    with pytest.raises(CacheError, match="record 2 is of example 2, not of 3"):
        write(tmp_path / "by_id").read([2], [3])
    for index in (-1, LENGTH):
        with pytest.raises(IndexError, match=f"{index}.*valid are 0 to 22"):
            opened.read([index, index], [0, 0])


def test_load_has_a_limit(tmp_path):
    opened = write(tmp_path / "cache")
    size = LENGTH * (4 + 4 * CLASSES)
    opened.load(limit_bytes=size)
    with pytest.raises(CacheError, match=f"takes {size} bytes in memory, the limit is {size - 1}"):
        opened.load(limit_bytes=size - 1)


def test_threads_may_read_together(tmp_path):
    opened = write(tmp_path / "cache")
    orders = [np.random.default_rng(seed).integers(0, LENGTH, 200) for seed in range(16)]
    with futures.ThreadPoolExecutor(4) as pool:
        for order, got in zip(orders, pool.map(opened.read, orders), strict=True):
            np.testing.assert_array_equal(got["logits"], LOGITS[order])


@pytest.mark.parametrize("change", ["cut", "replaced", "deleted"])
def test_a_file_that_changes_under_an_open_cache_is_an_error(tmp_path, change):
    opened = write(tmp_path / "cache")
    path = tmp_path / "cache" / "records.npy"
    if change == "cut":
        with open(path, "r+b") as file:
            file.truncate(10)
    elif change == "replaced":
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
    for read in (opened.load, lambda: opened.read([0])):
        with pytest.raises(CacheError, match=f"{path} has changed since it was opened"):
            read()


def test_the_format_is_the_documented_one(tmp_path):
    write(tmp_path / "cache")
    records = np.load(tmp_path / "cache" / "records.npy")
    assert records.shape == (LENGTH,)
    record = np.array(10, "<i4").tobytes() + LOGITS[10].astype("<f4").tobytes()
    assert records[10].tobytes() == record
