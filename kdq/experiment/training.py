"""What an arm trains on, with whom and towards what; a search's short runs do so too."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax

from kdq.config import Experiment
from kdq.experiment import check
from kdq.experiment.inputs import Inputs
from kdq.experiment.quantized import recipe
from kdq.experiment.teaching import Teaching
from kdq.quantize.network import Weights
from kdq.train import objective, regime
from kdq.train.objective import Objective
from kdq.train.sharding import ONE_DEVICE, Layout
from kdq.train.state import TrainState, create_state
from kdq.train.training import Training


def begin(
    experiment: Experiment,
    name: str,
    seed: int,
    start: Weights,
    *,
    model: nn.Module,
    inputs: Inputs,
    teaching: Teaching,
    optimizer: optax.GradientTransformation,
    validate: Callable[[Weights], dict[str, float]],
    steps: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[Training, TrainState]:
    """What there is to do, and the state before the first step.

    Args:
      experiment: has the arm.
      name: of the arm.
      seed: of the run; the arm adds its own offset.
      start: the weights to start from.
      model: of these.
      inputs: the data.
      teaching: who teaches.
      optimizer: see `make_optimizer`.
      validate: see `Training`.
      steps: a schedule of so many; None: the arm's own.
      layout: the devices that train.
    """
    arm, own_seed = experiment.arms[name], seed + experiment.arms[name].seed_offset
    last_step = inputs.last_step(arm) if steps is None else steps
    steps = inputs.steps(arm) if steps is None else steps
    aim = objective.of_arm(experiment, name, steps)
    qat = recipe(experiment, arm)
    adapters, memory = _beside(aim, model, inputs, start, teaching, own_seed)
    state = create_state(
        start.variables,
        start.qparams,
        experiment.optimizer,
        seed=own_seed,
        steps=steps,
        learning_rate=arm.learning_rate,
        fixed_scales=experiment.quantize.fixed_scales,
        adapters=adapters,
        memory=memory,
        average=teaching.average,
        peer=teaching.peer,
        track_oscillations=qat.track_oscillations or bool(qat.freeze),
    )
    task = Training(
        model=model,
        optimizer=optimizer,
        objective=aim,
        dataset=inputs.stream(
            arm, own_seed, extra=teaching.extra, lookup=teaching.lookup, layout=layout
        ),
        steps=last_step,
        eval_every=max(1, -(-last_step // experiment.evaluations)),
        validate=validate,
        teacher=teaching.teacher,
        teacher_arguments=teaching.arguments,
        regime=regime.of_recipe(qat, steps, f"config.qat.{arm.qat}"),
        freeze_norm_at=round(qat.freeze_norm * steps),
        layout=layout,
        compute=experiment.compute,
    )
    return task, state


def _beside(
    aim: Objective, model: nn.Module, inputs: Inputs, start: Weights, teaching: Teaching, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(adapters, memory)` of the objective's terms."""
    if not aim.student_layers:  # losses on logits have neither
        return {}, {}
    student = check.layers(model, start.variables, inputs.image)
    taught_by = {}
    if aim.teacher_layers:
        module, arguments = teaching.teacher.module, teaching.arguments
        variables = start.variables if arguments is None else arguments["variables"]
        taught_by = check.layers(module, variables, inputs.image)
    key = jax.random.fold_in(jax.random.key(seed), 2)
    return aim.init(key, student, taught_by, inputs.num_examples)
