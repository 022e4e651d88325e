"""Training with `{"method": "stochastic"}`: what it draws follows from seed and step alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resume_training
from compilations import count_compilations

from kdq import config, data, models, quantize
from kdq.quantize import QuantizationRule, TensorSpec
from kdq.quantize.network import Weights
from kdq.train import loop
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.step import train_step
from kdq.train.training import Plan, Training, create_state

MODEL = models.build("mlp", num_classes=3, widths=(6,))
OPTIMIZER = config.Optimizer()
TRAINING = Training(network=MODEL, optimizer=make_optimizer(OPTIMIZER), objective=Objective())
NUMBERS = {"seed": 0, "steps": 8, "learning_rate": 0.01}
# Integers, and in the last layer a number format.
RULES = (
    QuantizationRule(path="head", weights=TensorSpec(format="fp4_e2m1")),
    *quantize.uniform_rules(2, 3),
)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def dataset():
    return data.train_dataset(
        resume_training.source(), batch_size=8, seed=3, **resume_training.NORMALIZE
    )


@pytest.fixture(scope="module")
def start(dataset):
    """Variables, and quantizers that round by chance."""
    images = dataset[0]["image"]
    variables = jax.jit(MODEL.init)(jax.random.key(0), images)
    calibrated = quantize.calibrate(MODEL, variables, RULES, [images])
    variables, qparams = quantize.prepare(variables, calibrated, "stochastic")
    return Weights(variables=variables, qparams=qparams)


def test_each_step_and_seed_draws_its_own_without_a_compilation(start, dataset):
    def loss(seed, step):
        state = create_state(start, OPTIMIZER, **{**NUMBERS, "seed": seed})
        _, metrics = train_step(TRAINING, state.replace(step=jnp.int32(step)), dataset[0])
        return float(metrics["loss"])

    first = loss(0, 0)
    with count_compilations("train_step") as compiled:
        losses = [loss(seed, step) for seed in (0, 1) for step in (0, 1, 2)]
    assert not compiled
    assert losses[0] == first
    assert len(set(losses)) == 6


@pytest.mark.slow
def test_an_interrupted_run_ends_as_the_unbroken_one(start, dataset, tmp_path):
    plan = Plan(
        training=TRAINING,
        dataset=dataset,
        steps=NUMBERS["steps"],
        eval_every=4,
        validate=lambda weights: {
            "accuracy": 0.0,
            "nll": float(np.abs(weights.variables["params"]["head"]["kernel"]).mean()),
        },
    )

    def fit(workdir, on_step=lambda step: None):
        workdir.mkdir(exist_ok=True)
        state = create_state(start, OPTIMIZER, **NUMBERS)
        return loop.fit(plan, state, workdir, checkpoint_seconds=0.0, on_step=on_step)

    def stop(step):
        if step == 6:  # two steps after a checkpoint
            raise Interrupted

    unbroken, steps = fit(tmp_path / "unbroken"), []
    with pytest.raises(Interrupted):
        fit(tmp_path / "broken", stop)
    again = fit(tmp_path / "broken", steps.append)
    assert steps == [5, 6, 7, 8]
    for a, b in ((unbroken.last, again.last), (unbroken.selected.weights, again.selected.weights)):
        jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
        # Nothing is left of the chance.
        assert jax.tree.structure(b.qparams) == jax.tree.structure(quantize.plain(start.qparams))
    assert unbroken.selected.metrics == again.selected.metrics
