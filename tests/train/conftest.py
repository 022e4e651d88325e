"""A small network, quantizers and batches for the tests of kdq.train."""

import functools

import jax
import numpy as np
import pytest

from kdq import config, models, quantize
from kdq.distill import schedule, term
from kdq.distill.teacher import NO_TEACHER, Model, Stored
from kdq.quantize.network import Weights
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.step import train_step
from kdq.train.training import Training, create_state

OPTIMIZER = config.Optimizer()


class Net:
    """A model with batch norm, its variables and how to take steps with it."""

    def __init__(self):
        self.model = models.build("cnn", num_classes=3, widths=(3, 4), batch_norm=True)
        self.teacher = models.build("cnn", num_classes=3, widths=(5,))
        images = self.batch(0)["image"]
        init = jax.jit(lambda model, key: model.init(key, images), static_argnums=0)
        self.variables = init(self.model, jax.random.key(0))
        self.teacher_variables = init(self.teacher, jax.random.key(1))

    def batch(self, seed, size=8):
        rng = np.random.default_rng(seed)
        return {
            "image": rng.normal(size=(size, 6, 6, 1)).astype(np.float32),
            "label": rng.integers(0, 3, size).astype(np.int32),
        }

    @functools.cache  # noqa: B019 - one object a session
    def qparams(self, bits=4):
        rules = quantize.uniform_rules(bits, bits)
        images = [self.batch(0)["image"]]
        return quantize.calibrate(self.model, self.variables, rules, images, check=False)

    def state(self, qparams=None, optimizer=OPTIMIZER, **fields):
        fields = {"seed": 0, "steps": 20, "learning_rate": 0.01, **fields}
        weights = Weights(variables=self.variables, qparams=qparams or {})
        return create_state(weights, optimizer, **fields)

    def objective(self, alpha, temperature):
        """`(1 - alpha) CE + alpha T² KL`."""
        fields = {"loss": "kl", "weight": alpha, "temperature": temperature}
        return Objective(
            task_weight=schedule.constant(1 - alpha), terms=(term.build("kl", fields, "terms.kl"),)
        )

    def step(self, state, batch, objective, *, teacher=False, optimizer=OPTIMIZER):
        """`teacher`: False, True for the live one, "stored" for the logits in the batch, or any."""
        weights = Weights(variables=self.teacher_variables, qparams={})
        if isinstance(teacher, bool | str):
            live = Model(self.teacher, weights)
            teacher = {False: NO_TEACHER, True: live, "stored": Stored()}[teacher]
        training = Training(
            network=self.model,
            optimizer=make_optimizer(optimizer),
            objective=objective,
            teacher=teacher,
        )
        return train_step(training, state, batch)


@pytest.fixture(scope="session")
def net() -> Net:
    return Net()
