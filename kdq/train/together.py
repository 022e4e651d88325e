"""One compiled step for several seeds of an arm: their arrays have an axis of seeds in front.

Seeds are spread evenly over as many devices as divide them; those on one device are one `jax.vmap`.
Nothing passes between seeds or devices.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeVar

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdq.distill.teacher import Peer, Teacher
from kdq.schema import Compute
from kdq.train.objective import Objective
from kdq.train.regime import Regime
from kdq.train.state import TrainState
from kdq.train.step import train_step
from kdq.train.training import Training
from kdq.types import Batch, Metrics

SEEDS = PartitionSpec("seeds")
T = TypeVar("T")


class Program(Protocol):
    """The steps of one or more seeds."""

    def join(self, trees: Sequence[T]) -> T:
        """The states of all seeds as one, where steps want it."""

    def split(self, tree: T) -> list[T]:
        """What `join` and steps return, by seed."""

    def __call__(
        self, state: TrainState, batches: Sequence[Batch], *, freeze_norm: bool
    ) -> tuple[TrainState, Metrics]:
        """A step of each seed; see `train_step`."""


def program_of(
    tasks: Sequence[Training],
    states: Sequence[TrainState],
    devices: Sequence[jax.Device] | None = None,
) -> Program:
    """The program of one task or several.

    Args:
      tasks: as many as there are seeds.
      states: of these.
      devices: that several may use; None is all of this process.

    Raises:
      ValueError: the tasks can't share a program.
    """
    if len({signature(*one) for one in zip(tasks, states, strict=True)}) > 1:
        raise ValueError("tasks of one program must be alike in all but seed, data and weights")
    if len(tasks) == 1:
        return Alone(tasks[0])
    return Together(tasks, jax.local_devices() if devices is None else devices)


def signature(task: Training, state: TrainState) -> Hashable:
    """Equal for tasks that can share a program."""
    leaves, structure = jax.tree.flatten((state, task.teacher_arguments))
    numbers, aim = jax.tree.flatten((task.objective, task.regime))
    return (
        *(task.model, task.teacher, task.optimizer, task.compute, task.layout),
        *(task.steps, task.eval_every, task.freeze_norm_at),
        *(structure, tuple((np.shape(x), str(x.dtype)) for x in leaves)),
        *(aim, tuple(np.asarray(x).tobytes() for x in numbers)),
    )


class Alone:
    """One seed, on the mesh of its task."""

    def __init__(self, task: Training):
        self._task, self._layout = task, task.layout
        self._objective, self._regime = task.layout.copy((task.objective, task.regime))
        self._arguments = task.layout.place(task.teacher_arguments)

    def join(self, trees: Sequence[T]) -> T:
        return trees[0]

    def split(self, tree: T) -> list[T]:
        return [tree]

    def __call__(
        self, state: TrainState, batches: Sequence[Batch], *, freeze_norm: bool
    ) -> tuple[TrainState, Metrics]:
        task = self._task
        state, metrics = train_step(
            state,
            self._arguments,
            self._layout.batch(batches[0]),
            model=task.model,
            teacher=task.teacher,
            objective=self._objective,
            optimizer=task.optimizer,
            regime=self._regime,
            freeze_norm=freeze_norm,
            layout=self._layout,
            compute=task.compute,
        )
        if self._layout.must_wait:
            jax.block_until_ready(metrics)
        return state, metrics


class Together:
    """Several seeds."""

    def __init__(self, tasks: Sequence[Training], devices: Sequence[jax.Device]):
        self._task, self._count = tasks[0], len(tasks)
        used = max(n for n in range(1, len(devices) + 1) if self._count % n == 0)
        self._mesh = None
        if used > 1:
            self._mesh = jax.make_mesh(
                (used,), tuple(SEEDS), axis_types=(AxisType.Auto,), devices=devices[:used]
            )
        self._arguments = self.join([task.teacher_arguments for task in tasks])

    def join(self, trees: Sequence[T]) -> T:
        sharding = NamedSharding(self._mesh, SEEDS) if self._mesh else None
        return jax.tree.map(lambda *own: jax.device_put(np.stack(own), sharding), *trees)

    def split(self, tree: T) -> list[T]:
        host = jax.device_get(tree)
        return [jax.tree.map(lambda x: x[i], host) for i in range(self._count)]  # noqa: B023

    def __call__(
        self, state: TrainState, batches: Sequence[Batch], *, freeze_norm: bool
    ) -> tuple[TrainState, Metrics]:
        task = self._task
        return _steps(
            state,
            self._arguments,
            jax.tree.map(lambda *own: np.stack(own), *batches),  # placed with the call: faster
            model=task.model,
            teacher=task.teacher,
            objective=task.objective,
            optimizer=task.optimizer,
            regime=task.regime,
            freeze_norm=freeze_norm,
            compute=task.compute,
            mesh=self._mesh,
        )


@functools.partial(
    jax.jit,
    static_argnames=("model", "teacher", "optimizer", "freeze_norm", "compute", "mesh"),
    donate_argnames=("state",),
)
def _steps(
    state: TrainState,
    teacher_arguments: Any,
    batch: Batch,
    *,
    model: nn.Module,
    teacher: Teacher | Peer | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    regime: Regime | None,
    freeze_norm: bool,
    compute: Compute,
    mesh: Mesh | None,
) -> tuple[TrainState, Metrics]:
    """`train_step` along the first axis of state, teacher's arguments and batch."""

    def step(shared: Any, *own: Any) -> tuple[TrainState, Metrics]:
        objective, regime = shared
        static = {"model": model, "teacher": teacher, "optimizer": optimizer, "compute": compute}
        return train_step(
            *own, objective=objective, regime=regime, freeze_norm=freeze_norm, **static
        )

    side_by_side = jax.vmap(step, in_axes=(None, 0, 0, 0))

    def steps(shared: Any, *own: Any) -> tuple[TrainState, Metrics]:
        if len(state.step) > mesh.size:
            return side_by_side(shared, *own)
        # One a device; convolutions of a vmap are slower.
        alone = jax.tree.map(lambda x: x[0], own)
        return jax.tree.map(lambda x: x[None], step(shared, *alone))

    given = ((objective, regime), state, teacher_arguments, batch)
    if mesh is None:
        return side_by_side(*given)
    specs = (PartitionSpec(), SEEDS, SEEDS, SEEDS)
    spread = jax.shard_map(steps, mesh=mesh, in_specs=specs, out_specs=SEEDS, check_vma=False)
    return spread(*given)
