"""Makes the training of an arm from its config; a search's short runs use it too."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from kdq.config import Experiment
from kdq.experiment import check
from kdq.experiment.inputs import Inputs
from kdq.experiment.quantized import recipe
from kdq.experiment.teaching import Teaching
from kdq.quantize.network import Weights
from kdq.train import objective
from kdq.train.optimizer import make_optimizer
from kdq.train.sharding import ONE_DEVICE, Layout
from kdq.train.training import Plan, Training, TrainState, build_regime, create_state


def make_plan(
    experiment: Experiment,
    name: str,
    seed: int,
    start: Weights,
    *,
    model: nn.Module,
    inputs: Inputs,
    teaching: Teaching,
    validate: Callable[[Weights], dict[str, float]] = lambda weights: {},
    steps: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[Plan, TrainState]:
    """Makes the plan of an arm's training, and the state before its first step.

    Args:
      experiment: has the arm.
      name: of the arm.
      seed: of the run; the arm adds its own offset.
      start: the weights to start from.
      model: of these.
      inputs: the data.
      teaching: who teaches.
      validate: see `Plan`; by default there is nothing to score.
      steps: a schedule of so many; None: the arm's own.
      layout: the devices that train.
    """
    arm, arm_seed = experiment.arms[name], seed + experiment.arms[name].seed_offset
    last_step = inputs.last_step(arm) if steps is None else steps
    steps = inputs.steps(arm) if steps is None else steps
    qat = recipe(experiment, arm)
    training = Training(
        network=model,
        optimizer=make_optimizer(experiment.optimizer),
        objective=objective.arm_objective(experiment, name, steps, inputs.task),
        teacher=teaching.teacher,
        regime=build_regime(qat, steps, f"config.qat.{arm.qat}"),
        layout=layout,
        compute=experiment.compute,
    )
    adapters, memory = _init_terms(training, inputs, start, arm_seed)
    state = create_state(
        start,
        experiment.optimizer,
        seed=arm_seed,
        steps=steps,
        learning_rate=arm.learning_rate,
        fixed_scales=experiment.quantize.fixed_scales,
        adapters=adapters,
        memory=memory,
        teacher=teaching.teacher,
        track_oscillations=qat.track_oscillations or bool(qat.freeze),
    )
    plan = Plan(
        training=training,
        dataset=inputs.stream(
            arm, arm_seed, extra=teaching.extra, lookup=teaching.lookup, layout=layout
        ),
        steps=last_step,
        eval_every=max(1, -(-last_step // experiment.evaluations)),
        validate=validate,
        freeze_norm_at=round(qat.freeze_norm * steps),
    )
    return plan, state


def _init_terms(
    training: Training, inputs: Inputs, start: Weights, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `(adapters, memory)` of the objective's terms."""
    objective, teacher = training.objective, training.teacher
    if not objective.student_layers:  # losses on logits have neither
        return {}, {}
    student = check.layers(training.network, start.variables, inputs.image)
    taught_by = {}
    if objective.teacher_layers:
        # A moving average has the student's variables.
        weights = getattr(teacher, "weights", start)
        taught_by = check.layers(teacher.network, weights.variables, inputs.image)
    key = jax.random.fold_in(jax.random.key(seed), 2)
    return objective.init(key, student, taught_by, inputs.num_examples)
