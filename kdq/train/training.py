"""A training: what its steps are compiled for, what they change, and the plan of them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import grain
import jax
import jax.numpy as jnp
import optax

from kdq import config as kdq_config
from kdq import quantize
from kdq.distill import schedule
from kdq.distill.schedule import Schedule
from kdq.distill.teacher import NO_TEACHER, Teacher, TeacherState
from kdq.fields import limits_of
from kdq.quantize import oscillation
from kdq.quantize.network import Network, Weights
from kdq.schema import AT_ONCE, Compute, Qat
from kdq.train.objective import Objective
from kdq.train.optimizer import init_optimizer
from kdq.train.sharding import ONE_DEVICE, Layout
from kdq.types import Array, Metrics, QParams, Variables


class Regime(flax.struct.PyTreeNode):
    """The course of the quantizers: schedules over the share of training done, or None."""

    least_bits: Schedule | None = None  # quantizers have at least so many
    dampen: Schedule | None = None  # weight of `oscillation.dampening`
    freeze: Schedule | None = None  # oscillations a step above which a weight stops
    steps: Array | float = 1.0  # of the whole training

    def quantizers(self, qparams: QParams, step: Array) -> QParams:
        """Returns the quantizers that this step computes with."""
        if self.least_bits is None:
            return qparams
        return quantize.widened(qparams, self.least_bits(self._progress(step)))

    def penalty(self, params: Any, qparams: QParams, step: Array) -> Array | float:
        """Returns a summand of the loss."""
        if self.dampen is None:
            return 0.0
        return self.dampen(self._progress(step)) * oscillation.dampening(params, qparams)

    def track_oscillations(
        self, state: dict[str, Any], params: Any, qparams: QParams, step: Array
    ) -> tuple[dict[str, Any], Any, Metrics]:
        """Returns oscillations after an update, parameters with frozen weights, and shares."""
        if not state:
            return state, params, {}
        threshold = 1.0 if self.freeze is None else self.freeze(self._progress(step))
        state, params = oscillation.update(state, params, qparams, threshold)
        return state, params, oscillation.share(state)

    def _progress(self, step: Array) -> Array:
        return jnp.asarray(step, jnp.float32) / self.steps


def build_regime(recipe: Qat, steps: int, where: str) -> Regime:
    """Builds the regime of an arm that trains for `steps`; ConfigError for a bad schedule."""
    parts = {
        name: schedule.build(getattr(recipe, name), f"{where}.{name}", limits_of(Qat, name))
        for name in ("least_bits", "dampen", "freeze")
        if getattr(recipe, name)
    }
    return Regime(**parts, steps=jnp.float32(steps))


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


class TrainState(flax.struct.PyTreeNode):
    """The state between two steps. Invariant: `scales` names only quantizers that `qparams` has."""

    step: Array  # int32 scalar: steps taken
    seed: Array  # uint32 scalar; the random key of a step is fold_in(key(seed), step)
    params: Any  # float weights, also while they are trained quantized
    scales: quantize.Scales  # what of the quantizers trains; {} if nothing does
    model_state: dict[str, Any]  # every other collection of the model, e.g. "batch_stats"
    qparams: QParams  # quantizers as calibrated; `quantizers` has them with the trained scales
    adapters: dict[str, Any]  # of the terms of the objective, by name: they train, and stay behind
    memory: dict[str, Any]  # what those terms remember, by name; does not train
    teacher: TeacherState
    oscillation: dict[str, Any]  # of quantized weights; {} unless tracked
    opt_state: optax.OptState
    halted: Array  # bool scalar: a step met NaN or infinity; nothing changes any more

    @property
    def variables(self) -> Variables:
        return {"params": self.params, **self.model_state}

    @property
    def trainable(self) -> dict[str, Any]:
        """Returns what the optimizer changes, by the names of its parts."""
        return {
            "params": self.params,
            "scales": self.scales,
            "adapters": self.adapters,
            "peer": self.teacher.params if self.teacher.learns else {},
        }

    def replace_trainable(self, trainable: dict[str, Any], **changes: Any) -> "TrainState":
        """Returns the state with what `trainable` returned, changed, and with other changes."""
        parts = {k: v for k, v in trainable.items() if k != "peer"}
        state = self.replace(**parts, **changes)
        if not state.teacher.learns:
            return state
        return state.replace(teacher=state.teacher.replace(params=trainable["peer"]))

    @property
    def quantizers(self) -> QParams:
        return quantize.replace_scales(self.qparams, self.scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The course of a training: its batches, its length and its validations."""

    training: Training
    dataset: grain.MapDataset  # endless; element i is the batch of step i, or this process's rows
    steps: int
    eval_every: int
    validate: Callable[[Weights], dict[str, float]]  # -> the task's metrics on validation
    freeze_norm_at: float = math.inf  # step from which on `Training.freeze_norm` holds


def create_state(
    weights: Weights,
    optimizer: kdq_config.Optimizer,
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    fixed_scales: Sequence[str] = (),
    adapters: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    teacher: Teacher = NO_TEACHER,
    track_oscillations: bool = False,
) -> TrainState:
    """Makes the state before the first of `steps` steps; owns copies, since the step donates it.

    `weights` have the student's quantizers, those of `fixed_scales` (patterns, see
    `quantize.scales`) do not train; `optimizer` is the config that `steps` (of the whole training)
    and `learning_rate` (its peak) complete; `seed` is of all that is random in a step, `adapters`
    and `memory` are of `Objective.init`, and `teacher` is that of the `Training`.
    """
    # With its dtype, or a weakly typed array would stay so and compile a step of its own.
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, x.dtype), tree)
    params, qparams = weights.variables["params"], weights.qparams
    model_state = {name: tree for name, tree in weights.variables.items() if name != "params"}
    oscillations = oscillation.init(params, qparams) if track_oscillations else {}
    state = TrainState(
        step=jnp.int32(0),
        halted=jnp.bool_(False),
        seed=jnp.uint32(seed),
        params=copy(params),
        scales=copy(quantize.scales(qparams, fixed=fixed_scales)),
        model_state=copy(model_state),
        qparams=copy(qparams),
        adapters=copy(adapters or {}),
        memory=copy(memory or {}),
        teacher=copy(teacher.init(params, model_state)),
        oscillation=copy(oscillations),
        opt_state=(),
    )
    rates = {"learning_rate": learning_rate, "steps": steps}
    return state.replace(opt_state=init_optimizer(optimizer, state.trainable, **rates))
