"""The data of an experiment: its splits, as training streams and as batches in order."""

import functools
import math
from collections.abc import Sequence

import grain
import jax
import numpy as np

from kdq import data
from kdq.config import Arm, ConfigError, Experiment
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

    @functools.cached_property
    def splits(self) -> dict[str, data.Source]:
        config = self._config
        names = {"train": config.train, "validation": config.validation, "test": config.test}
        return {
            key: data.open_split(config.name, split, data_dir=config.data_dir or None)
            for key, split in names.items()
        }

    @property
    def num_examples(self) -> int:
        """Examples of the training split."""
        return len(self.splits["train"])

    @property
    def image(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of a batch of one image."""
        return jax.ShapeDtypeStruct((1, *self.splits["train"].image_shape), np.float32)

    def ids(self, arm: Arm) -> np.ndarray:
        """Returns the examples that an arm trains on, by id in the training split."""
        if not arm.without_classes:  # no need to read the labels
            return np.arange(self.num_examples)
        return np.flatnonzero(~np.isin(self.labels, arm.without_classes))

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The labels of the training split, [num_examples] int32."""
        return self.splits["train"].read(np.arange(self.num_examples))["label"]

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
            mean=self._config.mean,
            std=self._config.std,
            augment=self.augment if arm.augment else (),
            ids=self.ids(arm),
            extra=extra,
            lookup=lookup,
            process_index=index,
            process_count=count,
        )

    def split(
        self, name: str, size: int | None = None, *, limit: int | None = None, multiple: int = 1
    ) -> "Batches":
        """Returns a split's examples in order, in batches of one size.

        Args:
          name: "train", "validation" or "test".
          size: examples of a batch; None is `data.eval_batch_size`. At most those of the split.
          limit: only so many examples, the first; None is all.
          multiple: the size is rounded up to a multiple of it.
        """
        source, config = self.splits[name], self._config
        size = min(size or config.eval_batch_size, len(source))
        size = -(-size // multiple) * multiple
        batches = data.eval_batches(source, batch_size=size, mean=config.mean, std=config.std)
        return Batches(batches, size, len(source) if limit is None else min(limit, len(source)))

    def calibration_images(self) -> list[np.ndarray]:
        """Returns the first examples of the training split, in four batches of one shape, or more.

        So that a method can hold one of them out.
        """
        count = min(self._quantize.calibration_examples, self.num_examples)
        size = min(max(1, count // 4), self._config.eval_batch_size)
        return [b["image"] for b in self.split("train", size, limit=max(1, count // size) * size)]

    @functools.cached_property
    def validation(self) -> list[Batch]:
        """The validation split, on the device."""
        return [jax.device_put(batch) for batch in self.split("validation")]

    def validation_on(self, layout: Layout) -> list[Batch]:
        """Returns the validation split with images cut up over a mesh, all else whole."""
        if layout == ONE_DEVICE:
            return self.validation
        batches = self.split("validation", multiple=layout.batch_parts)
        return [{**batch, "image": layout.whole_batch(batch["image"])} for batch in batches]

    @functools.cached_property
    def test(self) -> list[Batch]:
        """The test split, on the device."""
        return [jax.device_put(batch) for batch in self.split("test")]


class Batches(Sequence[Batch]):
    """The first examples of a split in batches of one size, each made when it is asked for.

    "mask" [size] is 0 where the last batch has an example that is not among them.
    """

    def __init__(self, batches: Sequence[Batch], size: int, limit: int):
        self._batches, self._size, self._limit = batches, size, limit

    def __len__(self) -> int:
        return math.ceil(self._limit / self._size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        batch, first = self._batches[index], index * self._size
        counts = np.arange(first, first + self._size) < self._limit
        return {**batch, "mask": batch["mask"] * counts}

    def examples(self, key: str) -> np.ndarray:
        """Returns an array of all examples, [examples, ...], without padding."""
        return np.concatenate([batch[key][batch["mask"] > 0] for batch in self])
