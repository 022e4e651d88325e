"""An experiment's opened data, models and workdir: what its arms, searches and checks share."""

import functools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import flax.linen as nn
import jax
import numpy as np

from kdq import config as kdq_config
from kdq import models, provenance, quantize
from kdq.config import Arm, ConfigError, Experiment
from kdq.distill import capture
from kdq.experiment import plan
from kdq.experiment.inputs import Inputs
from kdq.experiment.progress import Progress
from kdq.experiment.quantized import OBSERVERS
from kdq.experiment.store import Store
from kdq.experiment.teaching import Teachers
from kdq.quantize.layers import LayerInfo
from kdq.record import ArmRecord
from kdq.tasks import Task
from kdq.train import sharding
from kdq.train.optimizer import make_optimizer
from kdq.types import Batch, Variables

T = TypeVar("T")


class Context:
    """One experiment in one process.

    Raises ConfigError for a task, model, observer, optimizer or mesh that can't be.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        progress: Progress | None = None,
        *,
        tensorboard: bool = False,
    ):
        self.experiment, self.tensorboard = experiment, tensorboard
        self.progress = progress or Progress()
        self.models = {}
        for key, fields in experiment.models.items():
            try:
                self.models[key] = models.build(**fields)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"config.models.{key}: {error}") from error
        self.store = Store(experiment, workdir)
        for name, arm in experiment.arms.items():
            if arm.observer not in OBSERVERS:
                where = f"config.arms.{name}.observer:"
                raise ConfigError(kdq_config.unknown(where, arm.observer, OBSERVERS))
        make_optimizer(experiment.optimizer)  # or say now that it is not valid
        self.layout = sharding.make_layout(experiment.mesh)
        if experiment.seeds_at_once > 1 and self.layout.mesh:
            raise ConfigError(
                f"config.seeds_at_once={experiment.seeds_at_once} with a mesh of "
                f"{self.layout.size} devices: expected a mesh of 1 with more than one seed at once"
            )
        self.inputs = Inputs(experiment)
        self.teachers = Teachers(experiment, self.models, self.store, self.inputs)
        # Of the variables of a model, by its key.
        self.shapes = functools.cache(lambda key: shapes(self.models[key], self.inputs.image))
        self._results: dict[str, dict[Hashable, object]] = {}

    @property
    def task(self) -> Task:
        """The task, with what it has to know of the training split."""
        return self.inputs.task

    @functools.cached_property
    def validation(self) -> list[Batch]:
        """The validation split where training is: images cut up over a mesh, all else whole."""
        inputs, layout = self.inputs, self.layout
        if layout == sharding.ONE_DEVICE:
            return inputs.validation
        batches = inputs.split("validation", multiple=layout.batch_parts)
        return [{**batch, inputs.key: layout.whole_batch(batch[inputs.key])} for batch in batches]

    @functools.cached_property
    def example(self) -> np.ndarray:
        """One input of the training split, as models take it, [1, ...]."""
        return self.inputs.split("train", 1)[0][self.inputs.key]

    def model(self, arm: Arm | str) -> nn.Module:
        """Returns the model of an arm."""
        arm = self.experiment.arms[arm] if isinstance(arm, str) else arm
        return self.models[arm.model]

    def layers(self, key: str) -> dict[str, LayerInfo]:
        """Returns the layers of a model that can be quantized."""
        return quantize.list_layers(self.models[key], self.shapes(key), self.inputs.image)

    def outputs(self, key: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the layers of a model whose outputs can be captured."""
        return capture.list_outputs(self.models[key], self.shapes(key), self.inputs.image)

    def once(self, kind: str, key: Hashable, make: Callable[[], T], most: int = 4) -> T:
        """Returns what `make` returned for this key, or calls it; the last `most` keys are kept."""
        results = self._results.setdefault(kind, {})
        results[key] = results.pop(key) if key in results else make()
        while len(results) > most:
            del results[next(iter(results))]
        return results[key]

    def identify(self, name: str, seed: int) -> ArmRecord:
        """Returns the record of an arm and seed as far as it is known before anything runs."""
        arm = self.experiment.arms[name]
        return ArmRecord(
            arm=name,
            seed=seed,
            kind="teacher" if name == self.experiment.teacher else arm.kind,
            bits=arm.bits or "fp32",
            observer=arm.observer if arm.bits else "",
            reference=arm.reference,
            quick=self.experiment.quick,
            task=self.inputs.bare_task.name,
            unit=self.inputs.bare_task.unit,
            config_digest=plan.experiment_digest(self.experiment),
            arm_digest=self.store.digests[name],
            commit=provenance.commit(),
            versions=provenance.versions(),
            device=provenance.device(),
            data={split: source.digest for split, source in self.inputs.splits.items()},
        )

    def has_teacher(self, name: str, seed: int) -> bool:
        """Returns whether an arm is compared with the teacher; what that is made of is not."""
        teacher = self.experiment.teacher
        if name in kdq_config.ancestors(self.experiment, teacher):
            return False
        return self.store.record(teacher, seed).status == "ok"


def shapes(model: nn.Module, image: jax.ShapeDtypeStruct) -> Variables:
    """Returns the shapes of a model's variables; nothing is computed."""
    return jax.eval_shape(quantize.as_network(model).init, jax.random.key(0), image)
