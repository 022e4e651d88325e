"""Keys of caches of teacher logits, and what stands in them."""

import dataclasses

import numpy as np

from kdq.distill.cache import write_cache
from kdq.distill.cache_key import CacheKey, Dense, Sampled, TopK, make_records

LENGTH, CLASSES = 23, 5
TOP_K = TopK(k=2, temperature=4.0)
SAMPLED = Sampled(samples=3, temperature=4.0, sampling_seed=0, proposal_temperature=0.7)
KEY = CacheKey(
    teacher="a teacher",
    teacher_model={"name": "cnn", "widths": (4, 8)},
    dataset="digits",
    split="train",
    data_digest="some data",
    mean=4.9,
    std=(6.0,),
    augment=({"name": "shift", "pixels": 1},),
    stream_seed=0,
    num_classes=CLASSES,
    target=TOP_K,
)
BY_ID = dataclasses.replace(KEY, augment=(), stream_seed=None, target=Dense())
LOGITS = np.random.default_rng(0).normal(size=(LENGTH, CLASSES)).astype(np.float32)
IDS = np.random.default_rng(1).permutation(LENGTH)  # the order of a stream


def batches(key, size=5):
    """The records of LOGITS in batches, the last one padded as an evaluation's."""
    for start in range(0, LENGTH, size):
        rows = np.arange(start, start + size)
        mask = rows < LENGTH
        rows = np.where(mask, rows, 0)
        if key.by_position:
            yield make_records(key, LOGITS[rows], IDS[rows], rows, mask=mask)
        else:
            yield make_records(key, LOGITS[rows], rows, mask=mask.astype(np.float32))


def write(directory, key=BY_ID):
    return write_cache(directory, key, batches(key), LENGTH)
