"""Everything that training changes, as one pytree."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from kdq import config as kdq_config
from kdq import quantize
from kdq.quantize import oscillation
from kdq.train.optimizer import init_optimizer
from kdq.types import Array, QParams, Variables


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
    average: dict[str, Any]  # {"params", "model_state"}: the student's moving average, or {}
    peer: dict[str, Any]  # {"params", "model_state"} of a network that is trained at once, or {}
    oscillation: dict[str, Any]  # of quantized weights, see kdq.quantize.oscillation; {} if untold
    opt_state: optax.OptState
    halted: Array  # bool scalar: a step met NaN or infinity; nothing changes any more

    @property
    def variables(self) -> Variables:
        return {"params": self.params, **self.model_state}

    @property
    def trainable(self) -> dict[str, Any]:
        """What the optimizer changes, by the names of its parts."""
        return {
            "params": self.params,
            "scales": self.scales,
            "adapters": self.adapters,
            "peer": self.peer.get("params", {}),
        }

    def replace_trainable(self, trainable: dict[str, Any], **changes: Any) -> "TrainState":
        """The state with what `trainable` returned, changed, and with other changes."""
        peer = {**self.peer, "params": trainable["peer"]} if self.peer else {}
        parts = {k: v for k, v in trainable.items() if k != "peer"}
        return self.replace(**{"peer": peer, **parts, **changes})

    @property
    def quantizers(self) -> QParams:
        return quantize.replace_scales(self.qparams, self.scales)


def create_state(
    variables: Variables,
    qparams: QParams,
    optimizer: kdq_config.Optimizer,
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    fixed_scales: Sequence[str] = (),
    adapters: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    average: bool = False,
    peer: Variables | None = None,
    track_oscillations: bool = False,
) -> TrainState:
    """The state before the first of `steps` steps; owns copies, since the step donates it.

    Args:
      variables: of the student.
      qparams: its quantizers; {} for none.
      optimizer: the config that `steps` and `learning_rate` complete.
      seed: of dropout and of all else that is random in a step.
      steps: of the whole training.
      learning_rate: its peak.
      fixed_scales: patterns of quantizers whose scale does not train, see `quantize.scales`.
      adapters: see `Objective.init`.
      memory: see `Objective.init`.
      average: whether to keep the moving average of the student's weights.
      peer: variables of a network that is trained at once.
      track_oscillations: whether to count those of the quantized weights.
    """
    # With its dtype, or a weakly typed array would stay so and compile a step of its own.
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, x.dtype), tree)
    state = TrainState(
        step=jnp.int32(0),
        halted=jnp.bool_(False),
        seed=jnp.uint32(seed),
        params=copy(variables["params"]),
        scales=copy(quantize.scales(qparams, fixed=fixed_scales)),
        model_state=copy(_split(variables)["model_state"]),
        qparams=copy(qparams),
        adapters=copy(adapters or {}),
        memory=copy(memory or {}),
        average=copy(_split(variables)) if average else {},
        peer=copy(_split(peer)) if peer else {},
        oscillation=copy(oscillation.init(variables["params"], qparams))
        if track_oscillations
        else {},
        opt_state=(),
    )
    rates = {"learning_rate": learning_rate, "steps": steps}
    return state.replace(opt_state=init_optimizer(optimizer, state.trainable, **rates))


def _split(variables: Variables) -> dict[str, Any]:
    others = {name: tree for name, tree in variables.items() if name != "params"}
    return {"params": variables["params"], "model_state": others}
