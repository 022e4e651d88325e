"""One step of training, the same for every arm: the teacher and the quantizers are optional."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kdq import quantize
from kdq.train.objective import Objective
from kdq.train.state import TrainState
from kdq.types import Array, Batch, Metrics, Variables


@partial(
    jax.jit,
    static_argnames=("model", "teacher", "optimizer"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    teacher_variables: Variables | None,
    batch: Batch,
    *,
    model: nn.Module,
    teacher: nn.Module | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """`(state, batch) -> (state, metrics)`; recompiles for new shapes only, not for new numbers.

    The teacher's logits are `batch["teacher_logits"]` if it has them, else those of `teacher`; with
    neither, labels alone teach. A loss or gradient that is not finite halts the state for good,
    so that the weights and the step that caused it can be examined.

    Returns:
      The next state, and metrics as masked sums over the batch (see `Objective`), with
      "grad_norm" of the step.
    """
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    teacher_logits = predict_teacher(teacher, teacher_variables, batch)

    def loss_fn(trainable):
        logits, model_state = quantize.apply(
            model,
            {"params": trainable["params"], **state.model_state},
            quantize.replace_scales(state.qparams, trainable["scales"]),
            batch["image"],
            train=True,
            mutable=list(state.model_state),
            rngs={"dropout": key},
        )
        loss, sums = objective(logits, batch, teacher_logits)
        return loss, (sums, model_state)

    trainable = {"params": state.params, "scales": state.scales}
    (loss, (sums, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & ~state.halted

    def advance() -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        return state.replace(
            step=state.step + 1,
            model_state=model_state,
            opt_state=opt_state,
            **optax.apply_updates(trainable, updates),
        )

    state = jax.lax.cond(finite, advance, lambda: state.replace(halted=jnp.bool_(True)))
    return state, {**sums, "grad_norm": grad_norm}


def predict_teacher(
    teacher: nn.Module | None, variables: Variables | None, batch: Batch
) -> Array | None:
    """What the teacher says of a batch, [batch, classes]; None if there is no teacher."""
    if "teacher_logits" in batch:
        return batch["teacher_logits"]
    if teacher is None:
        return None
    return jax.lax.stop_gradient(teacher.apply(variables, batch["image"], train=False))
