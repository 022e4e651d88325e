"""Runs arms: each starts, is calibrated, trained, packed and measured the same way."""

import functools
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq import config as kdq_config
from kdq import data, files, models, provenance, quantize
from kdq.config import Arm, ConfigError, Experiment
from kdq.experiment import measure, plan
from kdq.experiment.progress import Progress, Record
from kdq.quantize import observers
from kdq.quantize.rules import match
from kdq.train import loop, optimizer
from kdq.train.checkpoint import Checkpointer
from kdq.train.diagnose import NonFiniteError
from kdq.train.loop import Fit, Selection, Weights
from kdq.train.objective import Objective
from kdq.train.state import create_state
from kdq.types import Batch, Variables

log = logging.getLogger(__name__)

OBSERVERS = {
    "absmax": observers.AbsMax(),
    "min_max": observers.MinMax(),
    "moving_average": observers.MovingAverage(),
    "percentile": observers.Percentile(),
    "mse": observers.MSE(),
}


def run(
    experiment: Experiment,
    workdir: str | Path,
    *,
    arms: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Runs every arm and seed that `workdir` does not have yet; returns all their records.

    Args:
      experiment: from `kdq.config.freeze`.
      workdir: made if need be. A run that was killed goes on where it was.
      arms: only these and what they need; None is all.
      progress: told what happens.

    Raises:
      ConfigError: something that the config names does not exist, or `workdir` holds an arm that
        was run with another config. Nothing has been trained then.
    """
    return _Runner(experiment, Path(workdir), progress or Progress()).run(arms)


class _Runner:
    """One experiment in one process: its data and models, and what arms share."""

    def __init__(self, experiment: Experiment, workdir: Path, progress: Progress):
        self.experiment, self.workdir, self.progress = experiment, workdir, progress
        self.digests = plan.digests(experiment)
        self.models = _build_models(experiment)
        for name, arm in experiment.arms.items():
            if arm.observer not in OBSERVERS:
                where = f"config.arms.{name}.observer:"
                raise ConfigError(kdq_config.unknown(where, arm.observer, OBSERVERS))
        self.optimizer = optimizer.make_optimizer(experiment.optimizer)
        self.augment = _augmentations(experiment)
        # Arms of one seed run one after another, so few of these are in use at once.
        self.weights = functools.lru_cache(maxsize=8)(self._load_weights)
        self.teacher_logits = functools.lru_cache(maxsize=8)(self._predict)

    def run(self, arms: Sequence[str] | None) -> list[Record]:
        experiment = self.experiment
        names = list(experiment.arms) if arms is None else list(arms)
        for name in names:
            if name not in experiment.arms:
                raise ConfigError(kdq_config.unknown("arm", name, experiment.arms))
        order = plan.in_order(experiment, [experiment.teacher, *names])
        records = {
            (name, seed): self._finished(name, seed) for seed in experiment.seeds for name in order
        }
        if None in records.values():
            self._check_data()
        self.progress.start(len(records))
        for (name, seed), record in records.items():
            if record is None:
                record = records[name, seed] = self._run_arm(name, seed)
            self.progress.done(record)
        shown = [name for name in experiment.arms if name in order]
        return [records[name, seed] for name in shown for seed in experiment.seeds]

    # One arm.

    def _run_arm(self, name: str, seed: int) -> Record:
        arm, folder = self.experiment.arms[name], self._folder(name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        record = self._identity(name, seed)
        try:
            for parent in filter(None, (arm.init, arm.teacher)):
                if self._record(parent, seed)["status"] == "failed":
                    raise NonFiniteError(f"it needs arm {parent!r}, which failed")
            fit = self._train(name, seed)
            record |= {"status": "ok", **self._measure(name, seed, fit)}
        except NonFiniteError as error:
            log.error("arm %s, seed %d failed: %s", name, seed, error)
            record |= {"status": "failed", "error": f"arm {name}, seed {seed}: {error}"}
        text = json.dumps(record, indent=1, allow_nan=False)
        files.write_atomic(folder / "result.json", f"{text}\n".encode())
        return record

    def _train(self, name: str, seed: int) -> Fit:
        config, arm = self.experiment, self.experiment.arms[name]
        model, source = self.models[arm.model], self.splits["train"]
        start = self._start(arm, seed)
        steps = self._steps(arm)
        self.progress.arm(name, seed, steps)
        validate = functools.partial(self._validate, model)
        if not steps:
            metrics = validate(start)
            selected = Selection(weights=start, step=0, metrics=metrics)
            return Fit(last=start, last_step=0, selected=selected, seconds=0.0)
        state = create_state(
            start.variables,
            start.qparams,
            config.optimizer,
            seed=seed,
            steps=steps,
            learning_rate=arm.learning_rate,
            fixed_scales=config.quantize.fixed_scales,
        )
        live = arm.teacher and not config.cache_teacher
        extra = {}
        if arm.teacher and config.cache_teacher:
            extra["teacher_logits"] = self.teacher_logits(arm.teacher, seed, "train")
        dataset = data.train_dataset(
            source,
            batch_size=config.data.batch_size,
            seed=seed,
            mean=config.data.mean,
            std=config.data.std,
            augment=self.augment if arm.augment else (),
            extra=extra,
        )
        task = loop.Task(
            model=model,
            optimizer=self.optimizer,
            objective=Objective(alpha=arm.alpha, temperature=arm.temperature),
            dataset=dataset,
            steps=steps,
            eval_every=max(1, -(-steps // config.evaluations)),
            validate=validate,
            teacher=self._model(arm.teacher) if live else None,
            teacher_variables=self.weights(arm.teacher, seed) if live else None,
        )
        return loop.fit(
            task,
            state,
            self._folder(name, seed),
            checkpoint_seconds=config.checkpoint_seconds,
            on_step=self.progress.step,
        )

    def _steps(self, arm: Arm) -> int:
        return round(arm.epochs * len(self.splits["train"]) / self.experiment.data.batch_size)

    def _start(self, arm: Arm, seed: int) -> Weights:
        """The weights an arm starts from, calibrated if it is quantized."""
        model = self.models[arm.model]
        if arm.init:
            variables = self.weights(arm.init, seed)
        else:
            images = self._batches("train")[0]["image"][:1]
            variables = _init(model, jax.random.key(seed), images)
        if not arm.bits:
            return Weights(variables=variables, qparams={})
        config = self.experiment.quantize
        rules = quantize.uniform_rules(
            *kdq_config.parse_bits(arm.bits),
            keep=config.keep,
            keep_bits=config.keep_bits,
            observer=OBSERVERS[arm.observer],
        )
        qparams = quantize.calibrate(
            model, variables, rules, self._calibration_images(), train=False
        )
        return Weights(variables=variables, qparams=qparams)

    def _calibration_images(self) -> list[np.ndarray]:
        """The first examples of the training split, in batches of one shape."""
        count = min(self.experiment.quantize.calibration_examples, len(self.splits["train"]))
        batches = self._batches("train", size=min(count, self.experiment.data.eval_batch_size))
        return [batches[i]["image"] for i in range(max(1, count // len(batches[0]["label"])))]

    def _validate(self, model: nn.Module, weights: Weights) -> dict[str, float]:
        return measure.evaluate(model, weights, self._validation)

    def _measure(self, name: str, seed: int, fit: Fit) -> dict[str, Any]:
        experiment, arm = self.experiment, self.experiment.arms[name]
        teacher_is_there = (
            name == experiment.teacher or self._record(experiment.teacher, seed)["status"] == "ok"
        )
        identity = self._identity(name, seed)
        return measure.measure(
            fit,
            self.models[arm.model],
            self._test,
            self._folder(name, seed) / "model.safetensors",
            model_config=kdq_config.to_json(experiment.models[arm.model]),
            metadata={
                **{key: identity[key] for key in ("arm", "seed", "bits", "arm_digest")},
                "data": {
                    "name": experiment.data.name,
                    "mean": experiment.data.mean,
                    "std": experiment.data.std,
                },
            },
            teacher_logits=self.teacher_logits(experiment.teacher, seed, "test")
            if teacher_is_there
            else None,
        )

    def _identity(self, name: str, seed: int) -> Record:
        """The part of a record that is known before anything runs."""
        arm = self.experiment.arms[name]
        return {
            "arm": name,
            "seed": seed,
            "kind": "teacher" if name == self.experiment.teacher else arm.kind,
            "bits": arm.bits or "fp32",
            "observer": arm.observer if arm.bits else None,
            "reference": arm.reference or None,
            "config_digest": plan.experiment_digest(self.experiment),
            "arm_digest": self.digests[name],
            "commit": provenance.commit(),
            "versions": provenance.versions(),
            "device": provenance.device(),
            "data": {split: source.digest for split, source in self.splits.items()},
        }

    # What other arms left behind.

    def _folder(self, name: str, seed: int) -> Path:
        return self.workdir / name / str(seed)

    def _finished(self, name: str, seed: int) -> Record | None:
        """The record of an arm that has been run before."""
        path = self._folder(name, seed) / "result.json"
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        if record["arm_digest"] != self.digests[name]:
            raise ConfigError(
                f"{path} was made with another config (digest {record['arm_digest']}, now "
                f"{self.digests[name]}): choose another workdir, or delete {path.parent}"
            )
        return {**record, "reference": self.experiment.arms[name].reference or None}

    def _record(self, name: str, seed: int) -> Record:
        return json.loads((self._folder(name, seed) / "result.json").read_text())

    def _load_weights(self, name: str, seed: int) -> Variables:
        """The selected variables of an arm: what was trained, before any rounding."""
        arm = self.experiment.arms[name]
        if not arm.epochs:
            return self.weights(arm.init, seed)
        folder = self._folder(name, seed) / "checkpoints"
        with Checkpointer(folder) as checkpointer:
            found = checkpointer.restore({"selected": None})
        if found is None:
            raise FileNotFoundError(
                f"{folder} holds no checkpoint that can be read, but {folder.parent} has a result: "
                "delete that folder to train the arm again"
            )
        # By way of NumPy: Orbax ties arrays to a device, and a step compiles anew for such arrays.
        selected = jax.tree.map(np.asarray, found[1]["selected"])
        return jax.tree.map(jnp.asarray, {"params": selected["params"], **selected["model_state"]})

    def _predict(self, name: str, seed: int, split: str) -> np.ndarray:
        """Logits [examples, classes] of a teacher's selected weights on a whole split."""
        weights = Weights(variables=self.weights(name, seed), qparams={})
        return measure.predict(self._model(name), weights, self._batches(split))

    def _model(self, name: str) -> nn.Module:
        return self.models[self.experiment.arms[name].model]

    # The data.

    @functools.cached_property
    def splits(self) -> dict[str, data.Source]:
        config = self.experiment.data
        names = {"train": config.train, "validation": config.validation, "test": config.test}
        return {
            key: data.open_split(config.name, split, data_dir=config.data_dir or None)
            for key, split in names.items()
        }

    def _check_data(self) -> None:
        """Opens the splits and lists the layers: what is missing is said before anything trains."""
        classes = self.splits["train"].num_classes
        for key, fields in self.experiment.models.items():
            if fields.get("num_classes", classes) != classes:
                raise ConfigError(
                    f"config.models.{key}.num_classes={fields['num_classes']}, but "
                    f"{self.experiment.data.name} has {classes} classes"
                )
        for name, arm in self.experiment.arms.items():
            if arm.epochs and not self._steps(arm):
                raise ConfigError(
                    f"config.arms.{name}.epochs={arm.epochs} is not one step of "
                    f"{self.experiment.data.batch_size} examples"
                )
        image = jax.ShapeDtypeStruct((1, *self.splits["train"].image_shape), np.float32)
        for key in {arm.model for arm in self.experiment.arms.values() if arm.bits}:
            init = functools.partial(self.models[key].init, train=False)
            variables = jax.eval_shape(init, jax.random.key(0), image)
            layers = quantize.list_layers(self.models[key], variables, image, train=False)
            try:
                match(quantize.uniform_rules(8, 8, keep=self.experiment.quantize.keep), layers)
            except ValueError as error:
                raise ConfigError(f"config.quantize.keep, model {key!r}: {error}") from error
            names = [f"{path}/{half}" for path in layers for half in ("weights", "activations")]
            for pattern in self.experiment.quantize.fixed_scales:
                if not any(re.fullmatch(pattern, name) for name in names):
                    raise ConfigError(
                        f"config.quantize.fixed_scales, model {key!r}: {pattern!r} matches none of "
                        f"{names}"
                    )

    def _batches(self, split: str, size: int | None = None) -> data.EvalBatches:
        config = self.experiment.data
        size = min(size or config.eval_batch_size, len(self.splits[split]))
        return data.eval_batches(
            self.splits[split], batch_size=size, mean=config.mean, std=config.std
        )

    @functools.cached_property
    def _validation(self) -> list[Batch]:
        return [jax.device_put(batch) for batch in self._batches("validation")]

    @functools.cached_property
    def _test(self) -> list[Batch]:
        return [jax.device_put(batch) for batch in self._batches("test")]


# Runs once, but full optimization of the samplers takes ten times as long to compile.
@functools.partial(
    jax.jit,
    static_argnames=("model",),
    compiler_options={"xla_backend_optimization_level": 0},
)
def _init(model: nn.Module, key: jax.Array, images: np.ndarray) -> Variables:
    return model.init(key, images, train=False)


def _build_models(experiment: Experiment) -> dict[str, nn.Module]:
    built = {}
    for key, fields in experiment.models.items():
        try:
            built[key] = models.build(**fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.models.{key}: {error}") from error
    return built


def _augmentations(experiment: Experiment) -> tuple[data.Augmentation, ...]:
    try:
        return tuple(data.build_augmentations(experiment.data.augment))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.data.augment: {error}") from error
