"""A run of quantization-aware distillation that a test can interrupt, here or in a child process.

python resume_training.py WORKDIR KILL_AFTER_STEP
"""

import functools
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import scipy.special

from kdq import config, data, models, quantize
from kdq.distill import schedule, term
from kdq.distill.teacher import Model
from kdq.quantize.network import Weights
from kdq.train import loop
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.training import Plan, Training, create_state

STEPS, EVAL_EVERY, EXAMPLES, BATCH = 24, 4, 40, 8
OPTIMIZER = config.Optimizer(weight_decay=1e-3)
OBJECTIVE = Objective(
    task_weight=schedule.constant(0.5),
    terms=(term.build("kl", {"loss": "kl", "weight": 0.5, "temperature": 2.0}, "kl"),),
)


def source() -> data.Source:
    """Random images whose label is the brightest of three bands."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (EXAMPLES, 6, 6, 1)).astype(np.uint8)
    labels = (np.arange(EXAMPLES) % 3).astype(np.int32)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 55
    return data.from_arrays(images, labels, name="bands")


NORMALIZE = {"transforms": {"image": (data.Normalize(100.0, 60.0),)}}
MODEL = models.build("cnn", num_classes=3, widths=(3, 4), batch_norm=True)
TEACHER = models.build("cnn", num_classes=3, widths=(5,))


@functools.cache
def start():
    """What every run starts from: variables of both models, quantizers, validation batches."""
    validation = list(data.eval_batches(source(), batch_size=16, **NORMALIZE))
    images = validation[0]["image"]
    variables, teacher_variables = (
        jax.jit(model.init)(jax.random.key(i), images) for i, model in enumerate((MODEL, TEACHER))
    )
    rules = quantize.uniform_rules(4, 4)
    qparams = quantize.calibrate(MODEL, variables, rules, [images])
    return variables, teacher_variables, qparams, validation


def validate(weights):
    right, loss, count = 0.0, 0.0, 0.0
    for batch in start()[-1]:
        logits = quantize.predict(MODEL, weights.variables, weights.qparams, batch["image"])
        log_q = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
        right += (batch["mask"] * (log_q.argmax(-1) == batch["label"])).sum()
        loss -= (batch["mask"] * log_q[np.arange(len(log_q)), batch["label"]]).sum()
        count += batch["mask"].sum()
    return {"accuracy": float(right / count), "nll": float(loss / count)}


def make(learning_rate=0.01, wrap=lambda dataset: dataset, seed=0, optimizer=OPTIMIZER):
    """The plan (with a live teacher and batch norm) and the state before its first step.

    Seeds differ in their data, their weights and their teacher's.
    """
    variables, teacher_variables, qparams, _ = start()
    variables, teacher_variables = jax.tree.map(
        lambda x: x * (1 + 0.1 * seed), (variables, teacher_variables)
    )
    training = Training(
        network=MODEL,
        optimizer=make_optimizer(optimizer),
        objective=OBJECTIVE,
        teacher=Model(TEACHER, Weights(variables=teacher_variables, qparams={})),
    )
    plan = Plan(
        training=training,
        dataset=wrap(data.train_dataset(source(), batch_size=BATCH, seed=3 + seed, **NORMALIZE)),
        steps=STEPS,
        eval_every=EVAL_EVERY,
        validate=validate,
    )
    weights = Weights(variables=variables, qparams=qparams)
    state = create_state(weights, optimizer, seed=seed, steps=STEPS, learning_rate=learning_rate)
    return plan, state


def main(workdir: Path, kill_after: int) -> None:
    def kill(step):
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.fit(*make(), workdir, checkpoint_seconds=0.0, on_step=kill)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
