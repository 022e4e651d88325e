"""One step of training, the same for every arm: the teacher and the quantizers are optional."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kdq import quantize
from kdq.distill import capture
from kdq.distill.capture import Outputs
from kdq.distill.teacher import MovingAverage, Peer, Teacher
from kdq.schema import AT_ONCE, Compute
from kdq.train.convolution import fast_convolutions
from kdq.train.objective import Objective
from kdq.train.regime import Regime
from kdq.train.remat import rematerialized
from kdq.train.sharding import ONE_DEVICE, Layout
from kdq.train.state import TrainState
from kdq.train.streams import with_streams
from kdq.types import Batch, Metrics


@partial(
    jax.jit,
    static_argnames=("model", "teacher", "optimizer", "freeze_norm", "layout", "compute"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    teacher_arguments: Any,
    batch: Batch,
    *,
    model: nn.Module,
    teacher: Teacher | Peer | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    regime: Regime | None = None,
    freeze_norm: bool = False,
    layout: Layout = ONE_DEVICE,
    compute: Compute = AT_ONCE,
) -> tuple[TrainState, Metrics]:
    """`(state, batch) -> (state, metrics)`; recompiles for new shapes only, not for new numbers.

    A loss or gradient that is not finite halts the state for good, so that the weights and the step
    that caused it can be examined.

    Args:
      state: donated.
      teacher_arguments: what `teacher` computes with; None if it is part of the state, or absent.
      batch: training batch.
      model: the student.
      teacher: see `kdq.distill.teacher`; None for labels only.
      objective: its layers decide what is captured of both.
      optimizer: see `make_optimizer`.
      regime: how the quantizers change; None for not at all.
      freeze_norm: whether batch norm uses the statistics that it has, and keeps them.
      layout: where the arrays are.
      compute: in how many parts, and what is computed twice.

    Returns:
      The next state, and metrics as masked sums over the batch (see `Objective`), with
      "grad_norm" of the step, and the shares of weights that oscillate if that is tracked.
    """
    regime = regime or Regime()
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    teacher_arguments = layout.gather(teacher_arguments)

    def loss_fn(trainable, changing, batch, key):
        trainable, before = layout.gather(trainable), state.replace(**changing)
        taught = ask_teacher(teacher, teacher_arguments, before, batch, objective)
        qparams = quantize.replace_scales(state.qparams, trainable["scales"])
        quantizers = regime.quantizers(qparams, state.step)
        ask_student = partial(
            capture.run,
            model,
            {"params": trainable["params"], **before.model_state},
            quantize.with_keys(quantizers, jax.random.fold_in(key, 3)),
            batch["image"],
            objective.student_layers,
            train=True,
            freeze_norm=freeze_norm,
            mutable=list(before.model_state),
        )
        with rematerialized(compute.remat):
            student, model_state = with_streams(lambda rngs: ask_student(rngs=rngs), key)
        teaching, peer = taught, before.peer
        if isinstance(teacher, Peer):
            ask_peer = partial(
                capture.run,
                teacher.module,
                {"params": trainable["peer"], **before.peer["model_state"]},
                {},
                batch["image"],
                train=True,
                mutable=list(before.peer["model_state"]),
            )
            teaching, peer_state = with_streams(
                lambda rngs: ask_peer(rngs=rngs), jax.random.fold_in(key, 1)
            )
            peer = {**before.peer, "model_state": peer_state}
        loss, sums, memory = objective(
            student,
            batch,
            teaching,
            adapters=trainable["adapters"],
            memory=before.memory,
            step=state.step,
            key=jax.random.fold_in(key, 2),
        )
        if isinstance(teacher, Peer):
            loss += objective(teaching, batch, student, step=state.step)[0]
        loss += regime.penalty(trainable["params"], qparams, state.step)
        return loss, (sums, {"model_state": model_state, "peer": peer, "memory": memory})

    trainable = state.trainable
    changes = {"model_state": state.model_state, "peer": state.peer, "memory": state.memory}
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    with fast_convolutions():
        loss, sums, changes, grads = _in_parts(
            compute.accumulate, value_and_grad, trainable, changes, batch, key
        )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & ~state.halted

    def advance() -> tuple[TrainState, Metrics]:
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        advanced = state.replace(step=state.step + 1, opt_state=opt_state, **changes)
        advanced = advanced.replace_trainable(optax.apply_updates(trainable, updates))
        if isinstance(teacher, MovingAverage):
            average = teacher.follow(state.average, advanced.params, advanced.model_state)
            advanced = advanced.replace(average=average)
        past = state.oscillation
        oscillation, params, shares = regime.settle(
            past, advanced.params, advanced.quantizers, state.step
        )
        return advanced.replace(oscillation=oscillation, params=params), shares

    def halt() -> tuple[TrainState, Metrics]:
        shares = regime.settle(state.oscillation, state.params, state.quantizers, state.step)[2]
        return state.replace(halted=jnp.bool_(True)), shares

    state, shares = jax.lax.cond(finite, advance, halt)
    metrics = layout.replicate({**sums, "grad_norm": grad_norm, **shares})
    return layout.constrain(state), metrics


def _in_parts(count: int, value_and_grad, trainable, changes, batch, key):
    """`(loss, sums, changes, gradients)` of a batch that is taken in so many parts."""
    if count == 1:
        (loss, (sums, changes)), grads = value_and_grad(trainable, changes, batch, key)
        return loss, sums, changes, grads
    # Every count-th example, so that parts lie on all the devices that the batch lies on.
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def take(carried, part):
        changes, total = carried
        index, batch = part
        (loss, (sums, changes)), grads = value_and_grad(
            trainable, changes, batch, jax.random.fold_in(key, index)
        )
        return (changes, jax.tree.map(jnp.add, total, (loss, sums, grads))), None

    first = jax.tree.map(lambda x: x[0], parts)
    like = jax.eval_shape(value_and_grad, trainable, changes, first, key)
    (loss, (sums, _)), grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    # Convolutions in a loop are many times slower on a CPU.
    unroll = count if jax.default_backend() == "cpu" else 1
    carried = (changes, (loss, sums, grads))
    (changes, (loss, sums, grads)), _ = jax.lax.scan(
        take, carried, (jnp.arange(count), parts), unroll=unroll
    )
    loss, grads = jax.tree.map(lambda x: x / count, (loss, grads))
    return loss, sums, changes, grads


def ask_teacher(
    teacher: Teacher | Peer | None,
    arguments: Any,
    state: TrainState,
    batch: Batch,
    objective: Objective,
) -> Outputs | None:
    """What the teacher says of a batch; None of a peer, whom the loss itself asks."""
    if teacher is None or isinstance(teacher, Peer):
        return None
    if isinstance(teacher, MovingAverage):
        arguments = state.average
    return jax.lax.stop_gradient(teacher(arguments, batch, objective.teacher_layers))
