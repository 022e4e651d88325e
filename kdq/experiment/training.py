"""Makes the training of an arm from its config; a search's short runs use it too."""

from collections.abc import Callable

import flax.linen as nn
import jax

from kdq.config import Experiment
from kdq.distill import capture
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
    """Returns the plan of an arm's training from `start`, and the state before its first step.

    `steps` is the length of another schedule than the arm's own; without `validate`, there is
    nothing to score.
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
    aim, adapters, memory = training.objective, {}, {}
    if aim.student_layers:  # losses on logits have neither
        student = capture.list_outputs(model, start.variables, inputs.image)
        taught_by = {}
        if aim.teacher_layers:
            # A moving average has the student's variables.
            weights = getattr(teaching.teacher, "weights", start)
            network = teaching.teacher.network
            taught_by = capture.list_outputs(network, weights.variables, inputs.image)
        key = jax.random.fold_in(jax.random.key(arm_seed), 2)
        adapters, memory = aim.init(key, student, taught_by, inputs.num_examples)
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
