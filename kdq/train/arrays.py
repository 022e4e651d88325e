"""Training on arrays in memory, for a model and data of one's own: one call, and no files."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq.config import Optimizer
from kdq.distill.teacher import Stored
from kdq.train import objective
from kdq.train.diagnose import NonFiniteError
from kdq.train.loop import Weights, weights
from kdq.train.optimizer import make_optimizer
from kdq.train.state import create_state
from kdq.train.step import train_step


def fit_arrays(
    model: nn.Module,
    images: np.ndarray,
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
) -> Weights:
    """Trains by the step that every arm trains by; returns the last weights.

    Nothing is selected on validation, logged or kept on disk: for that, see `kdq.experiment`.

    Args:
      model: called as `model(images, train=...)`; returns logits.
      images: [examples, ...] float, as the model takes them.
      labels: [examples] int.
      epochs: passes over the examples, each in another order; the rate decays over all of them.
      learning_rate: its peak, of Adam.
      start: to go on from, with its quantizers if it has any; None is fresh weights.
      teacher_logits: [examples, classes], what a teacher says; goes with a recipe.
      recipe: an entry of `config.distill`, e.g. `kdq.arms.kl(alpha=0.9, temperature=2.0)`.
      batch_size: at most the number of examples.
      fixed_scales: patterns of quantizers whose scale does not train, see `quantize.scales`.
      seed: of fresh weights, of the order and of dropout.

    Raises:
      ValueError: arrays of different lengths, fewer examples than a batch, or a teacher without a
        recipe.
      ConfigError: what the recipe gets wrong.
      NonFiniteError: a loss or gradient was NaN or infinite; says at which step.
    """
    arrays = {"image": np.asarray(images, np.float32), "label": np.asarray(labels, np.int32)}
    if (teacher_logits is None) != (recipe is None):
        raise ValueError("fit_arrays: want teacher_logits and recipe, or neither")
    if teacher_logits is not None:
        arrays["teacher_logits"] = np.asarray(teacher_logits, np.float32)
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or lengths["image"] < batch_size:
        raise ValueError(f"fit_arrays: want {batch_size} examples or more, as many each: {lengths}")
    if start is None:
        init = jax.jit(model.init, static_argnames="train")
        variables = init(jax.random.key(seed), arrays["image"][:1], train=False)
        start = Weights(variables=variables, qparams={})
    steps = round(epochs * lengths["image"] / batch_size)
    config = Optimizer()
    state = create_state(
        start.variables,
        start.qparams,
        config,
        seed=seed,
        steps=steps,
        learning_rate=learning_rate,
        fixed_scales=fixed_scales,
    )
    aim = objective.of_recipe(recipe, steps, "recipe")
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(lengths["image"]) for _ in range(int(epochs) + 1)])
    for step in range(steps):
        ids = order[step * batch_size : (step + 1) * batch_size]
        state, _ = train_step(
            state,
            None,
            {name: array[ids] for name, array in arrays.items()},
            model=model,
            teacher=None if teacher_logits is None else Stored(),
            objective=aim,
            optimizer=make_optimizer(config),
        )
    if state.halted:
        raise NonFiniteError(f"NaN or infinity at step {int(state.step) + 1}")
    return weights(state)
