"""One compiled step for several seeds of an arm: their arrays have an axis of seeds in front.

Seeds are spread evenly over as many devices as divide them; those on one device are one `jax.vmap`.
Nothing passes between seeds or devices.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdq.train.step import train_step
from kdq.train.training import Plan, Training, TrainState
from kdq.types import Batch, Metrics

SEEDS = PartitionSpec("seeds")
T = TypeVar("T")


def make_program(
    plans: Sequence[Plan],
    states: Sequence[TrainState],
    devices: Sequence[jax.Device] | None = None,
) -> "Alone | Together":
    """Makes the program of one plan or several.

    `devices` are those that several may use; None is all of this process. Raises ValueError for
    plans that can't share a program.
    """
    if len({signature(*pair) for pair in zip(plans, states, strict=True)}) > 1:
        raise ValueError("plans of one program must be alike in all but seed, data and weights")
    trainings = [plan.training for plan in plans]
    if len(trainings) == 1:
        return Alone(trainings[0])
    return Together(trainings, jax.local_devices() if devices is None else devices)


def signature(plan: Plan, state: TrainState) -> Hashable:
    """Returns a value that is equal for plans that can share a program."""
    training = plan.training
    leaves, structure = jax.tree.flatten((state, training.teacher))
    numbers = jax.tree.leaves((training.objective, training.regime))
    return (
        *(jax.tree.structure(training), plan.steps, plan.eval_every, plan.freeze_norm_at),
        *(structure, tuple((np.shape(x), str(x.dtype)) for x in leaves)),
        tuple(np.asarray(x).tobytes() for x in numbers),
    )


class Alone:
    """The steps of one seed, on the mesh of its training."""

    def __init__(self, training: Training):
        self._training = training.place()

    def join(self, trees: Sequence[T]) -> T:
        """Returns the states of all seeds as one, where steps take it."""
        return trees[0]

    def split(self, tree: T) -> list[T]:
        """Returns what `join` and steps return, by seed."""
        return [tree]

    def __call__(
        self, state: TrainState, batches: Sequence[Batch], *, freeze_norm: bool
    ) -> tuple[TrainState, Metrics]:
        """Takes a step of each seed; see `train_step`."""
        training = self._training.replace(freeze_norm=freeze_norm)
        state, metrics = train_step(training, state, training.layout.batch(batches[0]))
        if training.layout.must_wait:
            jax.block_until_ready(metrics)
        return state, metrics


class Together:
    """The steps of several seeds; see `Alone`."""

    def __init__(self, trainings: Sequence[Training], devices: Sequence[jax.Device]):
        self._count = len(trainings)
        used = max(n for n in range(1, len(devices) + 1) if self._count % n == 0)
        self._mesh = None
        if used > 1:
            self._mesh = jax.make_mesh(
                (used,), tuple(SEEDS), axis_types=(AxisType.Auto,), devices=devices[:used]
            )
        # Numbers are the same for all seeds; teachers are not.
        teachers = self.join([training.teacher for training in trainings])
        self._training = trainings[0].replace(teacher=teachers)

    def join(self, trees: Sequence[T]) -> T:
        sharding = NamedSharding(self._mesh, SEEDS) if self._mesh else None
        return jax.tree.map(lambda *arrays: jax.device_put(np.stack(arrays), sharding), *trees)

    def split(self, tree: T) -> list[T]:
        host = jax.device_get(tree)
        return [jax.tree.map(lambda x: x[i], host) for i in range(self._count)]  # noqa: B023

    def __call__(
        self, state: TrainState, batches: Sequence[Batch], *, freeze_norm: bool
    ) -> tuple[TrainState, Metrics]:
        batch = jax.tree.map(lambda *rows: np.stack(rows), *batches)  # placed with the call: faster
        training = self._training.replace(freeze_norm=freeze_norm)
        return _steps(training, state, batch, mesh=self._mesh)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("state",))
def _steps(
    training: Training, state: TrainState, batch: Batch, *, mesh: Mesh | None
) -> tuple[TrainState, Metrics]:
    """`train_step` along the first axis of the teacher's arrays, of state and of batch."""
    by_part = lambda shared, own: training.replace(objective=shared, regime=shared, teacher=own)
    side_by_side = jax.vmap(train_step, in_axes=(by_part(None, 0), 0, 0))

    def steps(training: Training, state: TrainState, batch: Batch) -> Any:
        if len(state.step) > 1:
            return side_by_side(training, state, batch)
        # One a device; convolutions of a vmap are slower.
        first = lambda tree: jax.tree.map(lambda x: x[0], tree)
        alone = training.replace(teacher=first(training.teacher))
        return jax.tree.map(lambda x: x[None], train_step(alone, first(state), first(batch)))

    if mesh is None:
        return side_by_side(training, state, batch)
    specs = (by_part(PartitionSpec(), SEEDS), SEEDS, SEEDS)
    spread = jax.shard_map(steps, mesh=mesh, in_specs=specs, out_specs=SEEDS, check_vma=False)
    return spread(training, state, batch)
