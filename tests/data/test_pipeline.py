"""The training stream and evaluation batches: order, equality of paths, state, processes."""

import json

import numpy as np
import pytest

from kdq.data import (
    Cutout,
    Flip,
    Normalize,
    Shift,
    eval_batches,
    from_arrays,
    iterate,
    train_dataset,
)

NORMALIZE = Normalize(5.0, 4.0)
SCALE = {"transforms": {"image": (NORMALIZE,)}}
AUGMENT = {"transforms": {"image": (Shift(1), Flip(), Cutout(2), NORMALIZE)}}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)


@pytest.mark.parametrize("ids", [[0.5], [360], [-1], [2**32 + 1], [True]])
def test_ids_that_are_none_are_refused(digits, ids):
    with pytest.raises(ValueError, match="ids must be integers from 0 to 359"):
        train_dataset(digits, batch_size=4, seed=0, ids=np.array(ids), **SCALE)


def stream_ids(source, count: int, **kwargs) -> np.ndarray:
    dataset = train_dataset(source, **{"batch_size": 40, "seed": 0, **SCALE, **kwargs})
    return np.concatenate([dataset[step]["id"] for step in range(count)])


def test_each_epoch_is_another_permutation(digits):
    epochs = stream_ids(digits, 27).reshape(3, 360)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(360))
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert (epochs[first] == epochs[second]).mean() < 0.05


def test_batches_span_epochs_and_drop_nothing(digits):
    ids = stream_ids(digits, 9, batch_size=80)
    np.testing.assert_array_equal(ids, stream_ids(digits, 18))
    assert stream_ids(digits, 1, batch_size=1000)[:720].tolist() == ids.tolist()


def test_order_depends_on_the_seed_and_seeds_share_no_epoch(digits):
    ids = stream_ids(digits, 18, seed=0)
    np.testing.assert_array_equal(ids, stream_ids(digits, 18, seed=0))
    other = stream_ids(digits, 18, seed=1)
    # Were the key seed + epoch, epoch 1 of seed 0 would be epoch 0 of seed 1.
    for ours in ids.reshape(2, 360):
        for theirs in other.reshape(2, 360):
            assert (ours == theirs).mean() < 0.05


def test_batch_holds_the_examples_of_its_ids(digits):
    batch = train_dataset(digits, batch_size=16, seed=1, **SCALE)[3]
    raw = digits.read(batch["id"])
    np.testing.assert_allclose(batch["image"], (raw["image"] - 5.0) / 4.0, rtol=1e-6)
    np.testing.assert_array_equal(batch["label"], raw["label"])
    assert set(batch) == {"image", "label", "id"}
    assert {key: str(value.dtype) for key, value in batch.items()} == {
        "image": "float32",
        "label": "int32",
        "id": "int32",
    }


def test_memory_and_records_give_the_same_batches(digits, digits_by_record):
    ours, theirs = (
        train_dataset(source, batch_size=50, seed=7, **AUGMENT)
        for source in (digits, digits_by_record)
    )
    plain = train_dataset(digits, batch_size=50, seed=7, **SCALE)
    for step in (0, 1, 7, 8, 100):
        assert_same(ours[step], theirs[step])
        assert not np.array_equal(ours[step]["image"], plain[step]["image"])


def test_augmentation_changes_from_epoch_to_epoch(digits):
    dataset = train_dataset(digits, batch_size=360, seed=0, **AUGMENT)
    first, second = (dataset[epoch]["image"][np.argsort(dataset[epoch]["id"])] for epoch in (0, 1))
    assert (first != second).any(axis=(1, 2, 3)).mean() > 0.5


@pytest.mark.parametrize("num_threads", [0, 2])
def test_restored_iterator_continues_the_unbroken_run(digits, num_threads):
    dataset = train_dataset(digits, batch_size=50, seed=2, **AUGMENT)
    unbroken = iterate(dataset, num_threads=num_threads)
    for step in range(11):
        assert_same(next(unbroken), dataset[step])
    state = json.loads(json.dumps(unbroken.get_state()))
    expected = [next(unbroken) for _ in range(5)]
    again = train_dataset(digits, batch_size=50, seed=2, **AUGMENT)
    restored = iterate(again, state=state, num_threads=num_threads)
    started = iterate(again, start_step=11, num_threads=num_threads)
    unbroken.set_state(state)
    for batch in expected:
        for iterator in (restored, started, unbroken):
            assert_same(next(iterator), batch)


def test_iterate_takes_one_place_to_start(digits):
    dataset = train_dataset(digits, batch_size=50, seed=2, **SCALE)
    with pytest.raises(ValueError, match="not both"):
        iterate(dataset, start_step=1, state=iterate(dataset).get_state())


def test_processes_share_out_the_global_batch(digits):
    kwargs = {"batch_size": 48, "seed": 3, **AUGMENT}
    whole = train_dataset(digits, **kwargs)
    parts = [train_dataset(digits, process_index=p, process_count=3, **kwargs) for p in range(3)]
    for step in (0, 7, 20):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
        assert_same(joined, whole[step])


def test_extra_arrays_follow_the_ids(digits):
    logits = np.random.default_rng(0).normal(size=(360, 10)).astype(np.float32)
    batch = train_dataset(digits, batch_size=32, seed=0, extra={"teacher_logits": logits}, **SCALE)[
        4
    ]
    np.testing.assert_array_equal(batch["teacher_logits"], logits[batch["id"]])


@pytest.mark.parametrize("batch_size", [100, 120, 500])
def test_eval_batches_cover_the_split_once(digits, batch_size):
    batches = eval_batches(digits, batch_size=batch_size, **SCALE)
    assert len(list(batches)) == len(batches) == -(-360 // batch_size)
    assert {batch["image"].shape for batch in batches} == {(batch_size, 8, 8, 1)}
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.sum() == 360
    assert set(mask.tolist()) <= {0.0, 1.0}
    ids = np.concatenate([batch["id"] for batch in batches])
    np.testing.assert_array_equal(ids[mask == 1], np.arange(360))
    assert (ids[mask == 0] == 0).all()
    images = np.concatenate([batch["image"] for batch in batches])
    raw = digits.read(ids)
    np.testing.assert_allclose(images, (raw["image"] - 5.0) / 4.0, rtol=1e-6)


def test_eval_batches_of_processes(digits):
    whole = eval_batches(digits, batch_size=100, **SCALE)
    parts = [
        eval_batches(digits, batch_size=100, process_index=p, process_count=2, **SCALE)
        for p in range(2)
    ]
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert_same({key: np.concatenate([p[key] for p in pieces]) for key in batch}, batch)


def test_the_first_examples_alone_count_with_a_limit(digits):
    whole = eval_batches(digits, batch_size=50, **SCALE)
    first = eval_batches(digits, batch_size=50, limit=120, **SCALE)
    assert len(first) == 3
    assert [int(batch["mask"].sum()) for batch in first] == [50, 50, 20]
    for ours, theirs in zip(first, whole, strict=False):
        counts = ours["mask"] == 1
        assert_same(
            {k: v[counts] for k, v in ours.items()}, {k: v[counts] for k, v in theirs.items()}
        )
    assert len(eval_batches(digits, batch_size=50, limit=1000, **SCALE)) == len(whole)


def test_arrays_of_keys_without_a_transform_pass_untouched():
    tokens = np.arange(12, dtype=np.uint8).reshape(6, 2)
    source = from_arrays(tokens, np.arange(6))
    batch = train_dataset(source, batch_size=4, seed=0)[0]
    assert batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["image"], tokens[batch["id"]])
    double = {"label": (Normalize(0.0, 0.5),)}
    batch = eval_batches(source, batch_size=6, transforms=double)[0]
    np.testing.assert_array_equal(batch["image"], tokens)
    np.testing.assert_array_equal(batch["label"], 2.0 * np.arange(6))


def test_batches_to_evaluate_are_not_changed_at_random(digits):
    with pytest.raises(ValueError, match=r"at random by Shift\(pixels=1, fill=0\)"):
        eval_batches(digits, batch_size=8, **AUGMENT)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 50, "process_count": 4}, "multiple of the 4 processes, got 50"),
        ({"process_index": 2, "process_count": 2}, r"process_index must be in \[0, 2\), got 2"),
        ({"seed": -1}, "seed must not be negative"),
        ({"extra": {"teacher_logits": np.zeros((3, 10))}}, "has 3 rows; .* has 360 examples"),
        ({"extra": {"label": np.zeros(360)}}, "the name is taken"),
        ({"transforms": {"pixels": (NORMALIZE,)}}, r"key of digits in .* 'pixels'; valid: image"),
    ],
)
def test_errors(digits, kwargs, message):
    with pytest.raises(ValueError, match=message):
        train_dataset(digits, **{"batch_size": 8, "seed": 0, **SCALE, **kwargs})
