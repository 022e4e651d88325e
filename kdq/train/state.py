"""Everything that training changes, as one pytree."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from kdq import config as kdq_config
from kdq import quantize
from kdq.train.optimizer import init_optimizer
from kdq.types import Array, QParams, Variables


class TrainState(flax.struct.PyTreeNode):
    """The state between two steps. Invariant: `scales` names only quantizers that `qparams` has."""

    step: Array  # int32 scalar: steps taken
    seed: Array  # uint32 scalar; the random key of a step is fold_in(key(seed), step)
    params: Any  # float weights, also while they are trained quantized
    scales: dict[str, dict[str, Array]]  # quantizer scales that train; {} if none do
    model_state: dict[str, Any]  # every other collection of the model, e.g. "batch_stats"
    qparams: QParams  # quantizers as calibrated; `quantizers` has them with the trained scales
    opt_state: optax.OptState
    halted: Array  # bool scalar: a step met NaN or infinity; nothing changes any more

    @property
    def variables(self) -> Variables:
        return {"params": self.params, **self.model_state}

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
) -> TrainState:
    """The state before the first of `steps` steps; owns copies, since the step donates it.

    `fixed_scales` are patterns of quantizers whose scale does not train, see `quantize.scales`.
    """
    # With its dtype, or a weakly typed array would stay so and compile a step of its own.
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, x.dtype), tree)
    trainable = {
        "params": copy(variables["params"]),
        "scales": copy(quantize.scales(qparams, fixed=fixed_scales)),
    }
    return TrainState(
        step=jnp.int32(0),
        halted=jnp.bool_(False),
        seed=jnp.uint32(seed),
        model_state={k: copy(v) for k, v in variables.items() if k != "params"},
        qparams=copy(qparams),
        opt_state=init_optimizer(optimizer, trainable, learning_rate=learning_rate, steps=steps),
        **trainable,
    )
