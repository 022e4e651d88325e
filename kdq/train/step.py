"""One step of training, the same for every arm, and the search for what made it NaN or infinite."""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from kdq import quantize
from kdq.distill import capture
from kdq.distill.capture import with_streams
from kdq.quantize.calls import ModuleCall
from kdq.quantize.inputs import Inputs, unboxed
from kdq.quantize.network import Weights, as_network
from kdq.train.convolution import fast_convolutions
from kdq.train.training import Training, TrainState
from kdq.types import Array, Batch, Mean, Metrics

# A part of a batch -> ((loss, (totals, changes)), gradients).
PartOfStep = Callable[[Any, Any, Batch, Array], tuple[tuple[Array, tuple[Any, Any]], Any]]


@partial(jax.jit, donate_argnames=("state",))
def train_step(training: Training, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Takes one step; recompiles for new shapes only, not for new numbers.

    A loss or gradient that is not finite halts the state for good, so that the weights and the step
    that caused it can be examined.

    Returns the next state, and metrics: totals of the objective with their counts over the batch
    (see `Objective`), "loss" and "grad_norm" of the step, and the shares of weights that oscillate
    if that is tracked. The given state is donated.
    """
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    counts = training.objective.counts(batch)  # of the whole batch: gradients of its parts add up
    differentiate = jax.value_and_grad(partial(_loss, training, state, counts), has_aux=True)
    with fast_convolutions():
        loss, totals, changes, grads = _add_parts(
            training.compute.accumulate, differentiate, state, batch, key
        )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & ~state.halted

    def advance() -> tuple[TrainState, Metrics]:
        trainable = state.trainable
        updates, opt_state = training.optimizer.update(grads, state.opt_state, trainable)
        new = state.replace_trainable(
            optax.apply_updates(trainable, updates),
            step=state.step + 1,
            opt_state=opt_state,
            **changes,
        )
        teacher = training.teacher.update(new.teacher, new.params, new.model_state)
        oscillation, params, shares = training.regime.track_oscillations(
            state.oscillation, new.params, new.quantizers, state.step
        )
        return new.replace(teacher=teacher, oscillation=oscillation, params=params), shares

    def halt() -> tuple[TrainState, Metrics]:
        *_, shares = training.regime.track_oscillations(
            state.oscillation, state.params, state.quantizers, state.step
        )
        return state.replace(halted=jnp.bool_(True)), shares

    new, shares = jax.lax.cond(finite, advance, halt)
    count = lambda name: counts.get(name, counts["task_loss"])
    means = {name: Mean(total, count(name)) for name, total in totals.items()}
    metrics = {**means, "loss": totals["loss"], "grad_norm": grad_norm, **shares}
    return training.layout.constrain(new), training.layout.replicate(metrics)


def _loss(
    training: Training,
    state: TrainState,
    counts: dict[str, Array],
    trainable: dict[str, Any],
    changes: dict[str, Any],
    batch: Batch,
    key: Array,
) -> tuple[Array, tuple[dict[str, Array], dict[str, Any]]]:
    """Returns the loss of a part of a batch, and `(totals, changes)`."""
    layout, objective = training.layout, training.objective
    before = state.replace_trainable(layout.gather(trainable), **changes)
    inputs = objective.task.inputs(batch)
    quantizers = training.regime.quantizers(before.quantizers, state.step)
    run = partial(
        capture.run,
        training.network,
        before.variables,
        quantize.with_keys(quantizers, jax.random.fold_in(key, 3)),
        inputs,
        objective.student_layers,
        train=True,
        freeze_norm=training.freeze_norm,
        mutable=list(before.model_state),
    )
    with rematerialized(training.compute.remat):
        student, model_state = with_streams(lambda rngs: run(rngs=rngs), key)
    taught, teacher_state = layout.gather(training.teacher).ask(
        before.teacher, batch, inputs, objective.teacher_layers, jax.random.fold_in(key, 1)
    )
    loss, totals, memory = objective(
        student,
        taught,
        batch,
        counts=counts,
        adapters=before.adapters,
        memory=before.memory,
        step=state.step,
        key=jax.random.fold_in(key, 2),
    )
    totals["loss"] = jax.lax.stop_gradient(loss)
    if before.teacher.learns:
        loss += objective(taught, student, batch, counts=counts, step=state.step)[0]
    penalty = training.regime.penalty(before.params, before.quantizers, state.step)
    loss += penalty / training.compute.accumulate
    changes = {"model_state": model_state, "teacher": teacher_state, "memory": memory}
    return loss, (totals, changes)


def _add_parts(
    count: int, differentiate: PartOfStep, state: TrainState, batch: Batch, key: Array
) -> tuple[Array, Any, Any, Any]:
    """Returns `(loss, totals, changes, gradients)` of a batch that is taken in `count` parts."""
    trainable = state.trainable
    changes = {"model_state": state.model_state, "teacher": state.teacher, "memory": state.memory}
    if count == 1:
        (loss, (totals, changes)), grads = differentiate(trainable, changes, batch, key)
        return loss, totals, changes, grads
    # Every count-th example, so that parts lie on all the devices that the batch lies on.
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def take(carried, indexed):
        changes, sums = carried
        index, part = indexed
        part_key = jax.random.fold_in(key, index)
        (loss, (totals, changes)), grads = differentiate(trainable, changes, part, part_key)
        return (changes, jax.tree.map(jnp.add, sums, (loss, totals, grads))), None

    first = jax.tree.map(lambda x: x[0], parts)
    (loss, (totals, _)), grads = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(differentiate, trainable, changes, first, key),
    )
    # Convolutions in a loop are many times slower on a CPU.
    unroll = count if jax.default_backend() == "cpu" else 1
    (changes, (loss, totals, grads)), _ = jax.lax.scan(
        take, (changes, (loss, totals, grads)), (jnp.arange(count), parts), unroll=unroll
    )
    return loss, totals, changes, grads


@contextlib.contextmanager
def rematerialized(pattern: str) -> Iterator[None]:
    """Modules applied in this context whose path matches keep their inputs only.

    Activations of a block then take memory only while its gradient is computed, for one more
    forward pass (arXiv:1604.06174). On CPUs XLA sees through it and keeps them after all.

    Args:
      pattern: of "/"-joined module paths, all of a path; within a module that matches, others are
        part of it. "" is none.
    """
    if not pattern:
        yield
        return
    inside: list[str] = []

    def intercept(next_fun, args, kwargs, context):
        path = "/".join(context.module.path)
        if inside or context.method_name != "__call__" or not re.fullmatch(pattern, path):
            return next_fun(*args, **kwargs)

        def call(module, *args):
            inside.append(path)
            try:
                return module(*args, **kwargs)
            finally:
                inside.pop()

        return nn.remat(call)(context.module, *args)

    with nn.intercept_methods(intercept):
        yield


class NonFiniteError(RuntimeError):
    """Training met NaN or infinity."""


def _is_finite(tree: Any) -> Array:
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all() if leaves else jnp.bool_(True)


def first_nonfinite(training: Training, state: TrainState, batch: Batch) -> str:
    """Returns the first place, in the order of a step, that holds NaN or infinity, in words."""
    objective = training.objective
    inputs = objective.task.inputs(batch)
    if not _is_finite(inputs):
        return "the input images"
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    taught, _ = training.teacher.ask(
        state.teacher, batch, inputs, objective.teacher_layers, jax.random.fold_in(key, 1)
    )
    if not _is_finite(taught):
        return "what the teacher says"
    # Whether parameters and output of each layer are finite, in the order of calls.
    finite: dict[str, dict[str, Array]] = {}
    trained: dict[str, list[Array]] = {}
    for (*layer, _), leaf in traverse_util.flatten_dict(state.params).items():
        trained.setdefault("/".join(layer), []).append(leaf)

    def watch(call: ModuleCall) -> Any:
        outputs = call.run()
        if call.method == "__call__":
            # Those that train as well: rounding clips infinity.
            params = call.module.variables.get("params", {}), trained.get(call.path)
            checks = {"parameters": _is_finite(params), "output": _is_finite(outputs)}
            finite.setdefault(call.path, checks)
        return outputs

    weights = Weights(variables=unboxed(state.variables), qparams=state.quantizers)

    def forward(rngs: dict[str, Array]) -> None:
        call = Inputs(*inputs, rngs=rngs)
        network = as_network(training.network)
        network.run(weights, call, watch, train=True, mutable=list(state.model_state))

    with_streams(forward, key)
    for path, parts in finite.items():
        for part, is_finite in parts.items():
            if not is_finite:
                return f"the {part} of layer {path!r}" if path else f"the model's {part}"
    for name, params in state.adapters.items():
        if not _is_finite(params):
            return f"the adapter of term {name!r}"
    return "the loss or a gradient (every layer's output is finite)"
