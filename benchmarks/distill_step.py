"""Time of a distilled training step over the student's own, by where the teacher's word is from.

    python benchmarks/distill_step.py --out=benchmarks/results/distill_step.json

Student and teacher are those of configs/fashion_mnist.py, on random images. All variants take
turns, step by step, in one process; a ratio is the median over rounds of the variant's time over
that of the step with labels alone.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from interleaved import Step, publish, run, show, take_turns

from kdq import config, models
from kdq.distill import capture, sparse, term
from kdq.distill.methods import METHODS
from kdq.distill.teacher import NO_TEACHER, Model, Stored, Teacher
from kdq.quantize.network import Weights, as_network
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.step import train_step
from kdq.train.training import Training, create_state

OUT = flags.DEFINE_string("out", None, "JSON file for the figures; printed only if not given.")
ROUNDS = flags.DEFINE_integer("rounds", 30, "Timed rounds.")

BATCH, CLASSES, EXAMPLES, TEMPERATURE = 256, 10, 54_000, 4.0
OPTIMIZER = config.Optimizer()
STUDENT = {"name": "cnn", "widths": (8, 16, 32)}
TEACHER = {"name": "resnet", "depth": 8, "widths": (32, 32, 64, 128), "stem_pool": True}
LAYERS = {"student": "conv_2", "teacher": "stage_1_block_0"}  # 7×7 both
OPTIONS: dict[str, dict[str, Any]] = {
    # Averaged over positions, as these are used: of whole maps their distances took 55 and their
    # angles 123 times the student's own step.
    "relational_distance": {"pool": True},
    "relational_angle": {"pool": True},
    "contrastive": {"negatives": 1024},
}


def make_batch() -> dict[str, jax.Array]:
    """Random images, and what the caches of a random teacher would have said of them."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((BATCH, CLASSES), np.float32)
    indices, log_probs = sparse.top_k_targets(logits, 5, TEMPERATURE)
    drawn, weights = sparse.sample_targets(
        logits, 5, TEMPERATURE, seed=0, counters=np.arange(BATCH)
    )
    batch = {
        "image": rng.standard_normal((BATCH, 28, 28, 1), np.float32),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        "id": rng.permutation(EXAMPLES)[:BATCH].astype(np.int32),
        "teacher_logits": logits,
        "teacher_indices": np.asarray(indices),
        "teacher_log_probs": np.asarray(log_probs),
        "drawn": drawn,
        "teacher_weights": weights,
    }
    return jax.device_put(batch)


def make_step(
    student: nn.Module,
    weights: Weights,
    shapes: list[Any],
    entry: dict[str, Any] | None,
    taught_by: Teacher,
    batch: dict[str, jax.Array],
) -> Step:
    """Returns a step of the trainer with a term of distillation, or by labels alone."""
    terms = (term.build("term", entry, "term"),) if entry else ()
    objective = Objective(terms=terms, steps=np.float32(10_000))
    adapters, memory = objective.init(jax.random.key(2), *shapes, EXAMPLES)
    state = create_state(
        weights,
        OPTIMIZER,
        seed=0,
        steps=10_000,
        learning_rate=1e-3,
        adapters=adapters,
        memory=memory,
    )
    training = Training(
        network=student,
        optimizer=make_optimizer(OPTIMIZER),
        objective=objective,
        teacher=taught_by,
    ).place()

    def take():
        nonlocal state
        state, metrics = train_step(training, state, batch)
        return state, metrics

    return take


def variants() -> dict[str, Step]:
    """A step of the trainer for each way to be taught."""
    student, teacher = (models.build(**f, num_classes=CLASSES) for f in (STUDENT, TEACHER))
    batch = make_batch()
    image = batch["image"][:1]
    init = lambda model, seed: as_network(model).init(jax.random.key(seed), image)
    weights, teacher_weights = (
        Weights(variables=init(model, i), qparams={}) for i, model in enumerate((student, teacher))
    )
    shapes = [
        capture.list_outputs(model, arrays.variables, image)
        for model, arrays in ((student, weights), (teacher, teacher_weights))
    ]

    step = functools.partial(make_step, student, weights, shapes)
    live = Model(teacher, teacher_weights)
    soft = {"temperature": TEMPERATURE}
    steps = {
        "labels": step(None, NO_TEACHER, batch),
        "KD, live teacher": step({"loss": "kl", **soft}, live, batch),
        "KD, cached logits": step({"loss": "kl", **soft}, Stored(), batch),
        "KD, top-5 cache": step({"loss": "top_k_kl", **soft}, Stored(), batch),
        "KD, 5 sampled": step(
            {"loss": "sampled_kl", **soft}, Stored(), {**batch, "teacher_indices": batch["drawn"]}
        ),
    }
    for loss, method in METHODS.items():
        if method.layers == 1 and loss != "hidden_states":  # of transformers
            entry = {"loss": loss, **LAYERS, **OPTIONS.get(loss, {})}
            steps[f"{loss}, live teacher"] = step(entry, live, batch)
    return steps


def main(_: list[str]) -> None:
    title = f"CNN 8-16-32 taught by a ResNet-8 of 308k parameters, 28x28, batch {BATCH}"
    figures = {title: take_turns(variants(), "labels", rounds=ROUNDS.value)}
    show(title, figures[title])
    publish(figures, OUT.value, rounds=ROUNDS.value)


if __name__ == "__main__":
    run(main)
