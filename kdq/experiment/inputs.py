"""The data of an experiment: its splits, as training streams and as batches in order."""

import functools
from typing import Any

import grain
import jax
import numpy as np

from kdq import data, quantize, tasks
from kdq.config import Arm, ConfigError, Experiment
from kdq.tasks import Task
from kdq.train.sharding import ONE_DEVICE, Layout
from kdq.types import Batch


class Inputs:
    """The splits of an experiment, opened when they are first used."""

    def __init__(self, experiment: Experiment):
        self._config, self._quantize = experiment.data, experiment.quantize
        try:
            self.augment = tuple(data.build_augmentations(self._config.augment))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.data.augment: {error}") from error
        options = {name: value for name, value in experiment.task.items() if name != "name"}
        self.bare_task = tasks.build(experiment.task["name"], **options)  # without facts
        if len(self.bare_task.keys) != 1:
            raise ConfigError(
                f"config.task.keys={self.bare_task.keys}: expected one, as models of experiments "
                "take one input"
            )
        (self.key,) = self.bare_task.keys  # of batches: what models take
        self._normalize = data.Normalize(self._config.mean, self._config.std)

    @functools.cached_property
    def splits(self) -> dict[str, data.Source]:
        config = self._config
        names = {"train": config.train, "validation": config.validation, "test": config.test}
        return {
            key: data.open_split(config.name, split, data_dir=config.data_dir or None)
            for key, split in names.items()
        }

    @functools.cached_property
    def task(self) -> Task:
        """The task, with what it has to know of the training split."""
        return self.bare_task.with_facts(self.facts)

    @property
    def num_examples(self) -> int:
        """Examples of the training split."""
        return len(self.splits["train"])

    @property
    def image(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of a batch of one input."""
        return jax.ShapeDtypeStruct((1, *self.splits["train"].spec[self.key].shape), np.float32)

    def ids(self, arm: Arm) -> np.ndarray:
        """Returns the examples that an arm trains on, by id in the training split."""
        if not arm.without_classes:  # no need to read the labels
            return np.arange(self.num_examples)
        return np.flatnonzero(~np.isin(self.labels, arm.without_classes))

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The labels of the training split, [num_examples, ...]."""
        return self.read_labels("train", "label")

    def read_labels(self, name: str, key: str) -> np.ndarray:
        """Returns an array of all examples of a split as the source has it, [examples, ...]."""
        source = self.splits[name]
        return source.read(np.arange(len(source)))[key]

    @property
    def classes(self) -> int:
        """The number of classes that the data set names; 0 for real targets."""
        return len(self.splits["train"].facts.get("class_names", ()))

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Facts of the data set and those of the training targets that the task needs."""
        source, task = self.splits["train"], self.bare_task
        if task.target not in source.spec:  # refused by experiment.check
            return dict(source.facts)
        read_targets = functools.partial(self.read_labels, "train", task.target)
        return {**source.facts, **task.target_facts(read_targets)}

    def steps(self, arm: Arm) -> int:
        """Returns the steps of an arm's whole schedule."""
        return round(arm.epochs * len(self.ids(arm)) / self._config.batch_size)

    def last_step(self, arm: Arm) -> int:
        """Returns the step at which an arm's training ends."""
        return round(self.steps(arm) * arm.stop / arm.epochs) if arm.stop else self.steps(arm)

    def augments(self, arm: Arm) -> bool:
        """Returns whether an arm trains on changed images."""
        return bool(self.augment) and arm.augment

    def stream(
        self,
        arm: Arm,
        seed: int,
        *,
        extra: dict[str, np.ndarray] | None = None,
        lookup: data.Lookup | None = None,
        layout: Layout = ONE_DEVICE,
    ) -> grain.MapDataset:
        """Returns this process's rows of an arm's training stream, see `data.train_dataset`."""
        index, count = layout.rows_of(self._config.batch_size)
        return data.train_dataset(
            self.splits["train"],
            batch_size=self._config.batch_size,
            seed=seed,
            transforms={self.key: (*(self.augment if arm.augment else ()), self._normalize)},
            ids=self.ids(arm),
            extra=extra or {},
            lookup=lookup,
            process_index=index,
            process_count=count,
        )

    def split(
        self, name: str, size: int | None = None, *, limit: int | None = None, multiple: int = 1
    ) -> data.EvalBatches:
        """Returns the first `limit` examples of a split in order, all by default, in batches.

        Each has `size` examples, by default `data.eval_batch_size`, at most those of the split, and
        rounded up to a multiple of `multiple`.
        """
        source = self.splits[name]
        size = min(size or self._config.eval_batch_size, len(source))
        size = -(-size // multiple) * multiple
        transforms = {self.key: (self._normalize,)}
        return data.eval_batches(source, batch_size=size, transforms=transforms, limit=limit)

    def examples(self, name: str, key: str, limit: int | None = None) -> np.ndarray:
        """Returns an array of the first examples of a split, [examples, ...], as models take it."""
        batches = self.split(name, limit=limit)
        return np.concatenate([batch[key][batch["mask"] > 0] for batch in batches])

    def calibration_batches(self) -> list[quantize.Inputs]:
        """Returns the first examples of the training split, in four batches of one shape, or more.

        So that a method can hold one of them out. Padding, of examples and of tokens, is masked.
        """
        count = min(self._quantize.calibration_examples, self.num_examples)
        size = min(max(1, count // 4), self._config.eval_batch_size)
        batches = self.split("train", size, limit=max(1, count // size) * size)
        return [quantize.masked(batch[self.key], _mask(batch)) for batch in batches]

    @functools.cached_property
    def validation(self) -> list[Batch]:
        """The validation split, on the device."""
        return [jax.device_put(batch) for batch in self.split("validation")]

    @functools.cached_property
    def test(self) -> list[Batch]:
        """The test split, on the device."""
        return [jax.device_put(batch) for batch in self.split("test")]


def _mask(batch: Batch) -> np.ndarray:
    """Returns what of a batch is no padding: [batch], or [batch, positions] if it has tokens."""
    if "token_mask" not in batch:
        return batch["mask"]
    return batch["mask"][:, None] * batch["token_mask"]
