"""The one evaluation: streams over a split and keeps scalars of each prediction, never outputs."""

import dataclasses
import functools
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from kdq.evaluate.metrics import one_behind
from kdq.evaluate.statistics import PairedInterval, crossed_interval, paired_interval
from kdq.files import DamagedError, write_atomic
from kdq.quantize.network import Network, Weights, as_network
from kdq.tasks import Metric, Task
from kdq.types import Array, Batch

Reference = Callable[[Batch], Array]  # a batch -> outputs of another model, the teacher's

_EXAMPLES, _SEAL = "examples", "seal"  # members of a file of scores that are no scores
# Files that unpack to more than both are bombs.
_MOST_BYTES, _MOST_RATIO = 2**30, 200


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Scores of the predictions of a split that count, in the order of its batches.

    Their size does not depend on the number of classes or on the vocabulary: of each prediction a
    few scalars, and where a task measures several outputs one by one (labels of multilabel,
    targets of regression), as many of these.
    """

    # Score -> [predictions] or [predictions, outputs] float32.
    arrays: Mapping[str, np.ndarray]
    # [predictions] int64, the example of each: its id, or its place where batches have no ids.
    examples: np.ndarray

    def __len__(self) -> int:
        return len(self.examples)

    def compute(self, metric: Metric) -> float:
        """Returns the value of a metric over all predictions, in float64; nan of none."""
        return metric.compute(self.arrays)

    def values(self, *metrics: Metric) -> dict[str, float]:
        """Returns the values by name of those metrics whose scores are there."""
        return {m.name: self.compute(m) for m in metrics if set(m.scores) <= self.arrays.keys()}

    def save(self, path: str | os.PathLike[str]) -> int:
        """Writes the scores to `path`, compressed, in full or not at all; returns the bytes."""
        arrays = {**self.arrays, _EXAMPLES: self.examples}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays, **{_SEAL: _digest(arrays)})
        write_atomic(path, file.getvalue())
        return len(file.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Reads what `save` wrote.

        Raises:
          DamagedError: the contents are not those that were written.
          OSError: the file can't be read.
        """
        data = Path(path).read_bytes()
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > max(_MOST_BYTES, _MOST_RATIO * len(data)):
                raise ValueError(f"{len(data)} bytes would unpack to {size}")
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            intact = np.array_equal(arrays.pop(_SEAL), _digest(arrays))
            examples = arrays.pop(_EXAMPLES)
            fits = all(a.dtype == np.float32 and len(a) == len(examples) for a in arrays.values())
        except Exception as error:  # Python's reader raises almost anything for a damaged archive
            raise DamagedError(f"{path} can't be read as scores: {error}") from error
        if not (intact and fits):
            raise DamagedError(f"{path} is damaged, or was edited: it is not what its seal says")
        return cls(arrays=arrays, examples=examples)


def evaluate(
    network: Network | nn.Module,
    weights: Weights,
    task: Task,
    batches: Iterable[Batch],
    reference: Reference | None = None,
) -> Scores:
    """Scores each prediction of a split by one compiled function, a batch ahead of the device.

    The network is in evaluation mode; batches are of one shape, and what the task's weights hide
    counts for nothing. `reference` is a teacher, for `task.divergence`; see `outputs_of`.
    ValueError if no prediction counts.
    """
    network = as_network(network)

    def score(batch: Batch) -> tuple[dict[str, Array], Array, Array | None]:
        outputs = None if reference is None else reference(batch)
        return *_score(network, weights, batch, outputs, task=task), task.examples(batch)

    rows: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
    first = 0
    for (scores, counts, examples), _ in one_behind(score, batches):
        counted = np.nonzero(counts)
        kept = {name: value[counted].astype(np.float32) for name, value in scores.items()}
        ids = first + np.arange(len(counts)) if examples is None else examples
        rows.append((kept, ids[counted[: ids.ndim]].astype(np.int64)))
        first += len(counts)
    if not sum(len(examples) for _, examples in rows):
        raise ValueError("evaluate: the batches hold no prediction that is not masked")
    names = rows[0][0]
    return Scores(
        arrays={name: np.concatenate([scores[name] for scores, _ in rows]) for name in names},
        examples=np.concatenate([examples for _, examples in rows]),
    )


def outputs_of(network: Network | nn.Module, weights: Weights, task: Task) -> Reference:
    """Returns the function from a batch to a network's outputs, compiled."""
    return functools.partial(_outputs, as_network(network), weights, task=task)


def compare(
    metric: Metric,
    arms: Mapping[int, Scores],
    references: Mapping[int, Scores],
    confidence: float = 0.95,
) -> tuple[PairedInterval, PairedInterval]:
    """Computes the intervals of an arm's difference to another, in `metric.difference_unit`.

    Arms and references map each seed to its scores on the test split, of the same predictions: else
    ValueError. Returns the interval over seeds, and the one over seeds and test examples, never
    narrower: see `statistics.crossed`.
    """
    if set(arms) != set(references):
        raise ValueError(f"compare: seeds differ: {sorted(arms)} and {sorted(references)}")
    every = [*arms.values(), *references.values()]
    if any(not np.array_equal(scores.examples, every[0].examples) for scores in every):
        raise ValueError("compare: the scores are of different predictions")
    differences = {
        seed: metric.difference_contributions(
            metric.contributions(scores.arrays), metric.contributions(references[seed].arrays)
        )
        for seed, scores in arms.items()
    }
    means = {seed: float(values.mean()) for seed, values in differences.items()}
    over_seeds = paired_interval(means, dict.fromkeys(means, 0.0), confidence)
    return over_seeds, crossed_interval(differences, every[0].examples, confidence)


@functools.partial(jax.jit, static_argnames=("network", "task"))
def _outputs(network: Network, weights: Weights, batch: Batch, *, task: Task) -> Array:
    return network.select_prediction(network.apply(weights, task.inputs(batch)))


@functools.partial(jax.jit, static_argnames=("network", "task"))
def _score(
    network: Network, weights: Weights, batch: Batch, reference: Array | None, *, task: Task
) -> tuple[dict[str, Array], Array]:
    """Returns the scores of a batch's predictions, and the weights of these."""
    outputs = network.select_prediction(network.apply(weights, task.inputs(batch)))
    scores = task.scores(outputs, batch)
    if reference is not None:
        scores |= task.divergence(outputs, reference)
    return scores, task.weights(batch)


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the sha256 of arrays with their names, types and shapes: [32] uint8."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array))
    return np.frombuffer(digest.digest(), np.uint8)
