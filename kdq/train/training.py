"""A training: everything static of its steps, and the plan by which they are taken."""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import grain
import jax
import optax

from kdq.distill.teacher import NO_TEACHER, Teacher
from kdq.quantize.network import Network, Weights
from kdq.schema import AT_ONCE, Compute
from kdq.train.objective import Objective
from kdq.train.regime import Regime
from kdq.train.sharding import ONE_DEVICE, Layout


class Training(flax.struct.PyTreeNode):
    """The structure that `train_step` is compiled for, and the numbers that it takes as data.

    A pytree: the structure is static, so that another model, term or teacher compiles a step of its
    own. The leaves are data: temperatures, weights, schedules and a frozen teacher's arrays.
    Nothing in it changes from step to step; what does is in `TrainState`.
    """

    network: Network | nn.Module = flax.struct.field(pytree_node=False)  # the student
    optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    objective: Objective
    teacher: Teacher = NO_TEACHER
    regime: Regime = Regime()  # how the quantizers change
    # Whether batch norm uses the statistics that it has, and keeps them.
    freeze_norm: bool = flax.struct.field(default=False, pytree_node=False)
    # Where the arrays are, those that `Plan.validate` gets as well.
    layout: Layout = flax.struct.field(default=ONE_DEVICE, pytree_node=False)
    # In how many parts a step is computed, and what twice.
    compute: Compute = flax.struct.field(default=AT_ONCE, pytree_node=False)

    def place(self) -> "Training":
        """Returns the training with its numbers on every device and the teacher's arrays cut up."""
        objective, regime = self.layout.copy((self.objective, self.regime))
        place = self.layout.place if self.layout.mesh else jax.device_put
        return self.replace(objective=objective, regime=regime, teacher=place(self.teacher))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The course of a training: its batches, its length and its validations."""

    training: Training
    dataset: grain.MapDataset  # endless; element i is the batch of step i, or this process's rows
    steps: int
    eval_every: int
    validate: Callable[[Weights], dict[str, float]]  # -> the task's metrics on validation
    freeze_norm_at: float = math.inf  # step from which on `Training.freeze_norm` holds
