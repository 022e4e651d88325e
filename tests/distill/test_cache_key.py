"""Cache keys, the records made for them, and a replay of the stream that they are made from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from kdq import data
from kdq.distill.cache import CacheError, open_cache, write_cache
from kdq.distill.cache_key import (
    CacheKey,
    Dense,
    Sampled,
    TopK,
    digest_variables,
    make_records,
)

LENGTH, CLASSES = 23, 5
KEY = CacheKey(
    teacher="a teacher",
    teacher_model={"name": "cnn", "widths": (4, 8)},
    dataset="digits",
    split="validation",
    data_digest="some data",
    mean=4.9,
    std=6.0,
    augment=({"name": "shift", "pixels": 1},),
    stream_seed=0,
    num_classes=CLASSES,
    target=Dense(),
)
BY_ID = dataclasses.replace(KEY, augment=(), stream_seed=None)
LOGITS = np.random.default_rng(0).normal(size=(LENGTH, CLASSES)).astype(np.float32)


def test_equal_keys_in_other_words_are_equal():
    target = TopK(k=2, temperature=4.0)
    same = dataclasses.replace(
        KEY,
        teacher_model=freeze({"widths": [4, 8], "name": "cnn"}),
        mean=np.float64(4.9),
        std=np.array(6),
        augment=[freeze({"pixels": 1, "name": "shift"})],
        target=dataclasses.replace(target, temperature=4),
    )
    assert same.to_json() == dataclasses.replace(KEY, target=target).to_json()


@pytest.mark.parametrize("change", [{"augment": ()}, {"stream_seed": None}])
def test_augmentation_and_stream_belong_together(change):
    with pytest.raises(ValueError, match="augment and stream_seed belong together"):
        dataclasses.replace(KEY, **change)


@pytest.mark.parametrize(
    "target",
    [TopK(k=2, temperature=4.0), Sampled(samples=3, temperature=4.0, sampling_seed=0)],
    ids=lambda t: t.kind,
)
def test_records_do_not_depend_on_the_batch_size_or_its_padding(target):
    key = dataclasses.replace(KEY, target=target)
    ids, positions = np.arange(LENGTH)[::-1], np.arange(LENGTH)
    whole = make_records(key, LOGITS, ids, positions)
    parts = []
    for start in range(0, LENGTH, 5):
        rows = np.minimum(np.arange(start, start + 5), LENGTH - 1)
        mask = (np.arange(start, start + 5) < LENGTH).astype(np.float32)
        parts.append(make_records(key, LOGITS[rows], ids[rows], positions[rows], mask))
    for name, array in whole.items():
        assert len(array) == LENGTH
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    assert set(whole) == {"position", *key.record.names}


def test_make_records_refuses_what_the_key_does_not_say():
    with pytest.raises(ValueError, match="positions given: False; needed: True"):
        make_records(KEY, LOGITS, np.arange(LENGTH))
    with pytest.raises(ValueError, match="positions given: True; needed: False"):
        make_records(BY_ID, LOGITS, np.arange(LENGTH), np.arange(LENGTH))
    with pytest.raises(ValueError, match=r"logits \(23, 4\) must be \[b, 5\]"):
        make_records(BY_ID, LOGITS[:, :4], np.arange(LENGTH))


def test_digest_changes_with_every_path_dtype_shape_and_value():
    tree = {"params": {"a": {"kernel": jnp.arange(6.0)}, "b": {"bias": jnp.ones(2)}}}
    digest = digest_variables(tree)
    same = {"params": {"b": {"bias": np.ones(2, np.float32)}, "a": tree["params"]["a"]}}
    for equal in (same, freeze(tree), jax.tree.map(np.asarray, tree)):
        assert digest_variables(equal) == digest
    a, b = tree["params"]["a"]["kernel"], tree["params"]["b"]["bias"]
    others = [
        {"params": {"a": {"kernel": a.at[5].add(1e-6)}, "b": {"bias": b}}},
        {"params": {"a": {"kernel": a.reshape(2, 3)}, "b": {"bias": b}}},
        {"params": {"a": {"kernel": a.view(jnp.int32)}, "b": {"bias": b}}},
        {"params": {"a": {"bias": a}, "b": {"bias": b}}},
        {"params": {"a": {"kernel": a}, "b": {"bias": b}, "c": {"bias": b[:0]}}},
        {"params": {"a": {"kernel": a}}},
        {"params": {"a": {"kernel": b}, "b": {"bias": a}}},
        {"params": {"a": {"kernel": a}}, "batch_stats": {"b": {"bias": b}}},
    ]
    digests = [digest_variables(other) for other in others]
    assert len({digest, *digests}) == 1 + len(others)


def test_a_replay_of_the_augmented_stream_has_the_cached_logits(tmp_path, data_dir):
    source = data.open_split("digits", "validation", data_dir=data_dir)
    config = ({"name": "shift", "pixels": 1},)
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    teacher = jax.jit(lambda images: images.reshape(-1, 64) @ weights)
    length = 2 * len(source)  # two epochs

    def key(seed):
        return dataclasses.replace(
            KEY,
            teacher=digest_variables({"params": weights}),
            data_digest=source.digest,
            augment=config,
            stream_seed=seed,
            num_classes=10,
            target=Dense(),
        )

    def stream(seed, batch_size):
        dataset = data.train_dataset(
            source,
            batch_size=batch_size,
            seed=seed,
            transforms={"image": (*data.build_augmentations(config), data.Normalize(4.9, 6.0))},
        )
        for step, batch in enumerate(dataset):
            positions = np.arange(step * batch_size, (step + 1) * batch_size)
            yield positions, batch["id"], teacher(batch["image"])

    records = (
        make_records(key(5), logits, ids, positions) for positions, ids, logits in stream(5, 100)
    )
    write_cache(tmp_path / "cache", key(5), records, length)
    opened = open_cache(tmp_path / "cache", key(5))
    seen, epochs = 0, np.empty((length, 10))
    for positions, ids, live in stream(5, 48):  # the batch size is no part of the stream
        cached = opened.read(positions, ids)["logits"]
        np.testing.assert_allclose(cached, live, rtol=1e-6, atol=1e-6)
        epochs[(positions // len(source)) * len(source) + ids] = cached
        seen += len(positions)
        if seen == length:
            break
    # The epochs do differ: by id, an augmented teacher would be wrong.
    first, second = np.split(epochs, 2)
    assert (np.abs(first - second).max(-1) > 0.1).mean() > 0.5
    with pytest.raises(CacheError, match="stream_seed: expected 6, found 5"):
        open_cache(tmp_path / "cache", key(6))
    positions, ids, _ = next(stream(6, 48))
    with pytest.raises(CacheError, match="record 0 is of example"):
        opened.read(positions, ids)
