"""Training on arrays in memory, for a model and data of one's own: one call, and no files."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq import data, tasks
from kdq.config import Optimizer
from kdq.distill.teacher import NO_TEACHER, Stored
from kdq.quantize.network import Weights, as_network
from kdq.train import loop, objective
from kdq.train.optimizer import make_optimizer
from kdq.train.training import Plan, Training, create_state


def fit_arrays(
    model: nn.Module,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: float,
    learning_rate: float,
    start: Weights | None = None,
    teacher_logits: np.ndarray | None = None,
    recipe: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    fixed_scales: Sequence[str] = (),
    seed: int = 0,
    task: str = "classification",
) -> Weights:
    """Trains as every arm does (`kdq.train.loop.fit`); returns the last weights.

    Nothing is selected on validation or kept on disk: for that, see `kdq.experiment`.

    Args:
      model: called as `model(inputs, train=...)`; returns logits, or the task's outputs.
      inputs: [examples, ...] float, as the model takes them.
      labels: [examples] int; of other tasks [examples] or [examples, outputs] float.
      epochs: passes over the examples, each in another order; the rate decays over all of them.
      learning_rate: its peak, of Adam.
      start: to go on from, with its quantizers if it has any; None is fresh weights.
      teacher_logits: [examples, outputs], what a teacher says; goes with a recipe.
      recipe: an entry of `config.distill`, e.g. `kdq.arms.kl(alpha=0.9, temperature=2.0)`.
      batch_size: at most the number of examples.
      fixed_scales: patterns of quantizers whose scale does not train, see `quantize.scales`.
      seed: of fresh weights, of the order and of dropout.
      task: "classification", "multilabel" (labels 0 or 1) or "regression" (real targets; outputs
        are of targets standardized by these examples' mean and deviation).

    Raises:
      ValueError: arrays of different lengths, fewer examples than a batch, or a teacher without a
        recipe.
      ConfigError: what the recipe gets wrong, or labels of another task.
      NonFiniteError: a loss or gradient was NaN or infinite; says at which step, and where first.
    """
    inputs, labels = np.asarray(inputs, np.float32), np.asarray(labels)
    if (teacher_logits is None) != (recipe is None):
        raise ValueError("fit_arrays: want teacher_logits and recipe, or neither")
    stored = {} if teacher_logits is None else {"teacher_logits": np.float32(teacher_logits)}
    lengths = {name: len(x) for name, x in {"image": inputs, "label": labels, **stored}.items()}
    if len(set(lengths.values())) > 1 or len(inputs) < batch_size:
        raise ValueError(f"fit_arrays: want {batch_size} examples or more, as many each: {lengths}")
    built = tasks.build(task)
    built.check({built.target: labels}, {})
    built = built.with_facts(built.target_facts(lambda: labels))
    if start is None:
        variables = jax.jit(as_network(model).init)(jax.random.key(seed), inputs[:1])
        start = Weights(variables=variables, qparams={})
    steps = round(epochs * len(inputs) / batch_size)
    if not steps:
        return start
    config = Optimizer()
    state = create_state(
        start,
        config,
        seed=seed,
        steps=steps,
        learning_rate=learning_rate,
        fixed_scales=fixed_scales,
    )
    training = Training(
        network=model,
        optimizer=make_optimizer(config),
        objective=objective.build(recipe, steps, "recipe", built),
        teacher=Stored() if stored else NO_TEACHER,
    )
    source = data.from_arrays(inputs, labels)
    plan = Plan(
        training=training,
        dataset=data.train_dataset(source, batch_size=batch_size, seed=seed, extra=stored),
        steps=steps,
        eval_every=steps,
        validate=lambda _: {metric.name: 0.0 for metric in built.metrics},
    )
    with tempfile.TemporaryDirectory() as folder:
        return loop.fit(plan, state, Path(folder)).last
