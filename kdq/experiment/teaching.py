"""Teachers of arms: a network at every step, or outputs computed before."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq import config as kdq_config
from kdq import data, quantize
from kdq.config import Arm, Experiment
from kdq.distill import cache, cache_key
from kdq.distill.cache import Cache
from kdq.distill.cache_key import CacheKey
from kdq.distill.teacher import NO_TEACHER, Ensemble, Model, MovingAverage, Peer, Stored, Teacher
from kdq.evaluate import metrics
from kdq.experiment.inputs import Inputs
from kdq.experiment.store import Store, fresh_variables, load
from kdq.quantize.network import Weights
from kdq.types import Array, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching:
    """An arm's teacher, and its outputs where they were computed before."""

    teacher: Teacher = NO_TEACHER
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # stored, by example id
    lookup: data.Lookup | None = None  # stored, by position in the stream


class Teachers:
    """The teachers of an experiment's arms."""

    def __init__(
        self, experiment: Experiment, models: dict[str, nn.Module], store: Store, inputs: Inputs
    ):
        self._experiment, self._models = experiment, models
        self._store, self._inputs = store, inputs
        self.logits = functools.lru_cache(maxsize=8)(self._predict)

    def teaching(self, name: str, seed: int) -> Teaching:
        """Returns the teaching of the arm `name` in the run of `seed`."""
        arm = self._experiment.arms[name]
        if not arm.teacher:
            return Teaching()
        if arm.teacher in self._experiment.arms:
            return self._arm(arm, seed, self._stored_as(name))
        config = self._experiment.teachers[arm.teacher]
        return getattr(self, f"_{config.kind}")(config, arm, seed)

    def module(self, name: str) -> nn.Module | None:
        """The network whose layers the arm `name` may look at, if its teacher has one."""
        arm = self._experiment.arms[name]
        config = self._experiment.teachers.get(arm.teacher)
        if config is None:
            return self._models[self._experiment.arms[arm.teacher].model]
        if config.kind == "moving_average":
            return self._models[arm.model]
        if config.kind == "former_peer":
            return self._models[kdq_config.peer_of(self._experiment, config.arm).model]
        return load(config.path).network.module if config.kind == "packed" else None

    def offers(self, name: str) -> tuple[str, ...]:
        """Returns what terms of the arm `name` may read of its teacher, layers apart."""
        kind = self._stored_as(name)
        names = {"top_k": ("indices", "log_probs"), "sampled": ("indices", "weights")}
        return tuple(f"teacher_{array}" for array in names.get(kind, ("logits",)))

    def by_example(self, name: str) -> bool:
        """Returns whether the outputs are stored by example, whatever became of its image."""
        return self._stored_as(name) in ("memory", "shuffled")

    def _stored_as(self, name: str) -> str:
        """The kind of cache that the teacher of an arm speaks from; "none" if it runs."""
        arm, cache = self._experiment.arms[name], self._experiment.cache
        if arm.teacher in self._experiment.teachers:
            kind = self._experiment.teachers[arm.teacher].kind
            return kind if kind == "shuffled" else "none"
        terms = self._experiment.distill[arm.distill].terms.values()
        return "none" if any(term.get("teacher") for term in terms) else cache.kind

    # One method a kind of teacher.

    def _arm(self, arm: Arm, seed: int, kind: str) -> Teaching:
        if kind == "none":
            module = self._models[self._experiment.arms[arm.teacher].model]
            return Teaching(teacher=Model(module, self._weights(arm.teacher, seed)))
        if kind == "memory":
            logits = self.logits(arm.teacher, seed, "train")
            return Teaching(teacher=Stored(), extra={"teacher_logits": logits})
        stored = self._on_disk(arm, seed)
        rename = lambda arrays: {f"teacher_{k}": v for k, v in arrays.items() if k != "id"}
        if stored.key.by_position:
            lookup = lambda positions, ids: rename(stored.read(positions, ids))
            return Teaching(teacher=Stored(), lookup=lookup)
        return Teaching(teacher=Stored(), extra=rename(stored.load()))

    def _ensemble(self, config, arm: Arm, seed: int) -> Teaching:
        members = [self._experiment.arms[name].model for name in config.arms]
        return Teaching(
            teacher=Ensemble(
                networks=tuple(self._models[model] for model in members),
                members=tuple(self._weights(name, seed) for name in config.arms),
                shares=jnp.asarray(config.weights or [1.0] * len(members), jnp.float32),
                average=config.average,
            )
        )

    def _moving_average(self, config, arm: Arm, seed: int) -> Teaching:
        return Teaching(teacher=MovingAverage(self._models[arm.model], config.decay))

    def _peer(self, config, arm: Arm, seed: int) -> Teaching:
        module = self._models[config.model]
        if config.init:
            return Teaching(teacher=Peer(module, self._store.weights(config.init, seed)))
        # Another key than that of the student, which may be of the same model.
        key = jax.random.fold_in(jax.random.key(seed + arm.seed_offset), 1)
        images = self._inputs.split("train", 1)[0][self._inputs.key]
        return Teaching(teacher=Peer(module, fresh_variables(module, key, images)))

    def _former_peer(self, config, arm: Arm, seed: int) -> Teaching:
        module = self._models[kdq_config.peer_of(self._experiment, config.arm).model]
        variables = self._store.selected(config.arm, seed)["peer"]
        return Teaching(teacher=Model(module, Weights(variables=variables, qparams={})))

    def _packed(self, config, arm: Arm, seed: int) -> Teaching:
        packed = load(config.path)
        weights = Weights(variables=packed.variables, qparams=packed.qparams)
        return Teaching(teacher=Model(packed.network, weights))

    def _shuffled(self, config, arm: Arm, seed: int) -> Teaching:
        logits = self.logits(config.arm, seed, "train")
        rng, moved = np.random.default_rng(seed), np.arange(len(logits))
        labels = self._inputs.labels
        groups = labels if config.within_class else np.zeros_like(labels)
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            moved[members] = rng.permutation(members)
        return Teaching(teacher=Stored(), extra={"teacher_logits": logits[moved]})

    # Outputs of arms.

    def _weights(self, name: str, seed: int) -> Weights:
        return Weights(variables=self._store.weights(name, seed), qparams={})

    def _apply(self, name: str) -> Callable[[Weights, Array], Array]:
        module = self._models[self._experiment.arms[name].model]
        return lambda weights, images: quantize.predict(
            module, weights.variables, weights.qparams, images
        )

    def _predict(self, name: str, seed: int, split: str) -> np.ndarray:
        """Outputs [examples, outputs] of an arm's selected weights, unrounded, on a whole split."""
        weights, apply = self._weights(name, seed), self._apply(name)
        outputs = lambda batch: apply(weights, batch[self._inputs.key])
        return metrics.predict(outputs, self._inputs.split(split))

    def _on_disk(self, arm: Arm, seed: int) -> Cache:
        """The teacher's outputs in a cache under its folder, made now if they are not there."""
        config, inputs = self._experiment.cache, self._inputs
        augmented = inputs.augments(arm)
        arm_seed = seed + arm.seed_offset
        source = inputs.splits["train"]
        taught_by = self._experiment.arms[arm.teacher]
        weights = self._weights(arm.teacher, seed)
        apply = self._apply(arm.teacher)
        temperature = config.temperature
        targets = {
            "dense": cache_key.Dense,
            "top_k": lambda: cache_key.TopK(k=config.size, temperature=temperature),
            "sampled": lambda: cache_key.Sampled(
                samples=config.size, temperature=temperature, sampling_seed=arm_seed
            ),
        }
        split = self._experiment.data.train
        if augmented and arm.without_classes:
            split = f"{split} without classes {sorted(set(arm.without_classes))}"
        key = CacheKey(
            teacher=cache_key.digest_variables(weights.variables),
            teacher_model=kdq_config.to_json(self._experiment.models[taught_by.model]),
            dataset=self._experiment.data.name,
            split=split,
            data_digest=source.digest,
            mean=self._experiment.data.mean,
            std=self._experiment.data.std,
            augment=self._experiment.data.augment if augmented else (),
            stream_seed=arm_seed if augmented else None,
            num_classes=jax.eval_shape(apply, weights, inputs.image).shape[-1],
            target=targets[config.kind](),
        )
        length = inputs.num_examples
        if augmented:
            length = inputs.last_step(arm) * self._experiment.data.batch_size
        # By its key's digest: arms that differ in augmentation or length have caches side by side.
        name = f"{config.kind}-{kdq_config.digest([key.to_json(), length])}"
        folder = self._store.folder(arm.teacher, seed) / "caches" / name
        batches = self._batches_to_store(arm, arm_seed, augmented)
        records = (
            cache_key.make_records(
                key, apply(weights, b[inputs.key]), b["id"], b.get("position"), b.get("mask")
            )
            for b in batches
        )
        return cache.write_cache(folder, key, records, length)

    def _batches_to_store(self, arm: Arm, seed: int, augmented: bool) -> Iterator[Batch]:
        if not augmented:
            yield from self._inputs.split("train")
            return
        size = self._experiment.data.batch_size
        for step, batch in enumerate(data.iterate(self._inputs.stream(arm, seed))):
            yield {**batch, "position": np.arange(step * size, (step + 1) * size)}
