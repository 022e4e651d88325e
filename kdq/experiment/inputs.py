"""The data of an experiment: its splits, as training streams and as batches to evaluate."""

import functools

import grain
import jax
import numpy as np

from kdq import data
from kdq.config import Arm, ConfigError, Experiment
from kdq.train.sharding import ONE_DEVICE, Layout
from kdq.types import Batch


class Inputs:
    """Splits are opened when first used."""

    def __init__(self, experiment: Experiment):
        self._config, self._quantize = experiment.data, experiment.quantize
        try:
            self.augment = tuple(data.build_augmentations(self._config.augment))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.data.augment: {error}") from error
        self._normalize = data.Normalize(self._config.mean, self._config.std)

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
        """Of the training split."""
        return len(self.splits["train"])

    @property
    def image(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of one image."""
        return jax.ShapeDtypeStruct((1, *self.splits["train"].spec["image"].shape), np.float32)

    def ids(self, arm: Arm) -> np.ndarray:
        """The examples that an arm trains on, by id in the training split."""
        if not arm.without_classes:  # no need to read the labels
            return np.arange(self.num_examples)
        return np.flatnonzero(~np.isin(self.labels, arm.without_classes))

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Of the training split, [num_examples] int32."""
        return self.splits["train"].read(np.arange(self.num_examples))["label"]

    def steps(self, arm: Arm) -> int:
        """Of an arm's whole schedule."""
        return round(arm.epochs * len(self.ids(arm)) / self._config.batch_size)

    def last_step(self, arm: Arm) -> int:
        """The step at which an arm's training ends."""
        return round(self.steps(arm) * arm.stop / arm.epochs) if arm.stop else self.steps(arm)

    def augments(self, arm: Arm) -> bool:
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
        """The training stream of an arm, this process's rows of it; see `data.train_dataset`."""
        index, count = layout.rows_of(self._config.batch_size)
        return data.train_dataset(
            self.splits["train"],
            batch_size=self._config.batch_size,
            seed=seed,
            transforms={"image": (*(self.augment if arm.augment else ()), self._normalize)},
            ids=self.ids(arm),
            extra=extra or {},
            lookup=lookup,
            process_index=index,
            process_count=count,
        )

    def batches(
        self, split: str, size: int | None = None, *, multiple: int = 1, limit: int | None = None
    ) -> data.EvalBatches:
        """A split, or its first `limit` examples, in batches of at most `size`, a multiple."""
        size = min(size or self._config.eval_batch_size, len(self.splits[split]))
        size = -(-size // multiple) * multiple
        transforms = {"image": (self._normalize,)}
        return data.eval_batches(
            self.splits[split], batch_size=size, transforms=transforms, limit=limit
        )

    def calibration_images(self) -> list[np.ndarray]:
        """The first examples of the training split, in four batches of one shape, or in more.

        So that a method can hold one of them out.
        """
        count = min(self._quantize.calibration_examples, self.num_examples)
        batches = self.batches("train", size=min(max(1, count // 4), self._config.eval_batch_size))
        return [batches[i]["image"] for i in range(max(1, count // len(batches[0]["label"])))]

    @functools.cached_property
    def validation(self) -> list[Batch]:
        """On the device."""
        return [jax.device_put(batch) for batch in self.batches("validation")]

    def validation_on(self, layout: Layout) -> list[Batch]:
        """With images cut up over a mesh; the rest of a batch each process has whole."""
        if layout == ONE_DEVICE:
            return self.validation
        batches = self.batches("validation", multiple=layout.batch_parts)
        return [{**batch, "image": layout.whole_batch(batch["image"])} for batch in batches]

    @functools.cached_property
    def test(self) -> list[Batch]:
        """On the device."""
        return [jax.device_put(batch) for batch in self.batches("test")]
