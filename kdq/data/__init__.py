"""Data: TFDS without TensorFlow, NumPy transforms and one Grain pipeline.

A batch's trip: `open_split` reads a prepared TFDS data set (`digits` prepares itself, the MNIST
family is imported from IDX files by `prepare`) or NumPy arrays (`save_arrays`), `train_dataset`
shuffles, batches and transforms it, `iterate` prefetches with a state that can be checkpointed,
`eval_batches` walks a split once.
"""

from kdq.data.pipeline import EvalBatches, Lookup, eval_batches, iterate, train_dataset
from kdq.data.source import DataError, Source, Spec
from kdq.data.sources import open_split
from kdq.data.sources.arrays import from_arrays, save_arrays
from kdq.data.sources.idx import prepare, read_idx
from kdq.data.transforms import (
    Cutout,
    Flip,
    Normalize,
    Shift,
    Transform,
    Transforms,
    build_augmentations,
)

__all__ = [
    "Cutout",
    "DataError",
    "EvalBatches",
    "Flip",
    "Lookup",
    "Normalize",
    "Shift",
    "Source",
    "Spec",
    "Transform",
    "Transforms",
    "build_augmentations",
    "eval_batches",
    "from_arrays",
    "iterate",
    "open_split",
    "prepare",
    "read_idx",
    "save_arrays",
    "train_dataset",
]
