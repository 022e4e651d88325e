"""The contents of a cache of a teacher's outputs: its key, and the kinds of record."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from numpy.typing import ArrayLike

from kdq.distill.sparse import sample_targets, top_k_targets
from kdq.types import Variables

Layout = list[tuple[str, str, tuple[int, ...]]]  # array name, dtype, shape in a record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """All logits: "logits" [classes]. Serves any temperature."""

    kind: ClassVar[str] = "dense"

    def layout(self, num_classes: int) -> Layout:
        return [("logits", "<f4", (num_classes,))]

    def arrays(self, logits: np.ndarray, counters: np.ndarray) -> tuple[ArrayLike, ...]:
        return (logits,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest probabilities: "indices" [k], "log_probs" [k]; see `top_k_targets`."""

    kind: ClassVar[str] = "top_k"
    k: int
    temperature: float

    def layout(self, num_classes: int) -> Layout:
        return [("indices", "<i4", (self.k,)), ("log_probs", "<f4", (self.k,))]

    def arrays(self, logits: np.ndarray, counters: np.ndarray) -> tuple[ArrayLike, ...]:
        return top_k_targets(logits, self.k, self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """Classes drawn at random: "indices" [samples], "weights" [samples]; see `sample_targets`."""

    kind: ClassVar[str] = "sampled"
    samples: int
    temperature: float
    sampling_seed: int
    proposal_temperature: float = 1.0

    def layout(self, num_classes: int) -> Layout:
        return [("indices", "<i4", (self.samples,)), ("weights", "<f4", (self.samples,))]

    def arrays(self, logits: np.ndarray, counters: np.ndarray) -> tuple[ArrayLike, ...]:
        return sample_targets(
            logits,
            self.samples,
            self.temperature,
            seed=self.sampling_seed,
            counters=counters,
            proposal_temperature=self.proposal_temperature,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheKey:
    """Everything that decides what is in a cache, but for its length."""

    teacher: str  # `digest_variables` of the teacher
    teacher_model: Mapping[str, Any]  # the config that built it: parameters do not tell all
    dataset: str
    split: str
    data_digest: str  # `Source.digest`
    mean: float | Sequence[float]  # of the normalization, as in `train_dataset`
    std: float | Sequence[float]
    augment: Sequence[Mapping[str, Any]] = ()  # the config's entries, in their order
    # The seed given to `train_dataset`, of its order and of its augmentations; None if nothing is
    # augmented, where the order is of no importance.
    stream_seed: int | None = None
    num_classes: int
    target: Dense | TopK | Sampled

    def __post_init__(self) -> None:
        if bool(self.augment) != (self.stream_seed is not None):
            raise ValueError(
                "augment and stream_seed belong together: a cache of augmented images is indexed "
                f"by position in one stream; given {self.augment} and {self.stream_seed}"
            )

    @property
    def by_position(self) -> bool:
        """True if the index is the position in the training stream, not the example's id."""
        return self.stream_seed is not None

    @property
    def record(self) -> np.dtype:
        """The layout of a record."""
        return np.dtype([("id", "<i4"), *self.target.layout(self.num_classes)])

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON gives them back, with the target's fields and "kind"."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        target = fields.pop("target")
        fields |= {"kind": target.kind, **dataclasses.asdict(target)}
        for name in ("mean", "std"):
            fields[name] = np.asarray(fields[name], np.float64).tolist()
        return json.loads(json.dumps(fields, default=dict))


def digest_variables(variables: Variables) -> str:
    """SHA-256 in hex of a tree of arrays: its paths, dtypes, shapes and values.

    The order of the tree and whether its arrays are NumPy's or JAX's make no difference.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    digest = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        array = np.asarray(leaf)
        digest.update(repr((path, array.dtype.name, array.shape)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def make_records(
    key: CacheKey,
    logits: ArrayLike,
    ids: ArrayLike,
    positions: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> dict[str, np.ndarray]:
    """Makes what `write_cache` takes, from a batch of the teacher's logits [b, classes].

    `ids` are [b] int, `positions` [b] in the training stream, for `key.by_position` and only there;
    `mask` [b] is 0 on rows that only pad an evaluation batch: these are left out. Returns "id",
    "position" if there are any, and the arrays of the kind, each with a row an example.
    """
    if (positions is not None) != key.by_position:
        raise ValueError(f"positions given: {positions is not None}; needed: {key.by_position}")
    rows = slice(None) if mask is None else np.asarray(mask) > 0
    logits = np.asarray(logits, np.float32)[rows]
    if logits.ndim != 2 or logits.shape[1] != key.num_classes:
        raise ValueError(f"logits {logits.shape} must be [b, {key.num_classes}]")
    names = ("id", "position") if key.by_position else ("id",)
    where = dict(zip(names, (np.asarray(v)[rows] for v in (ids, positions)), strict=False))
    arrays = key.target.arrays(logits, where[names[-1]])
    kinds = [name for name, *_ in key.target.layout(key.num_classes)]
    return where | {name: np.asarray(x) for name, x in zip(kinds, arrays, strict=True)}
