"""Several seeds of one arm as one program, against one after another.

    python benchmarks/seeds.py --out=benchmarks/results/seeds.json

The digits student (float, and quantized to W4A4) and teacher, by the programs of
`kdq.train.together`: a seed by itself; its batch cut over two virtual devices; several seeds on one
device; several on two.
Milliseconds are of a step of one seed; the forms take turns.
"""

import os

os.environ["JAX_NUM_CPU_DEVICES"] = "2"

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from interleaved import publish, run, show, take_turns

from kdq import config, models, quantize, schema
from kdq.quantize.network import Weights
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.sharding import make_layout
from kdq.train.together import make_program
from kdq.train.training import Plan, Training, create_state

OUT = flags.DEFINE_string("out", None, "JSON file for the figures; printed only if not given.")
ROUNDS = flags.DEFINE_integer("rounds", 30, "Timed rounds of each network.")
SEEDS = (2, 5)
STEPS = 10  # of training, in a turn
DIGITS = Path(__file__).parents[1] / "configs" / "digits.py"


def main(_: list[str]) -> None:
    experiment = config.freeze(runpy.run_path(str(DIGITS))["get_config"]())
    figures = {}
    for title, name, bits in (
        ("student", "student", 0),
        ("student, QAT W4A4", "student", 4),
        ("teacher", "teacher", 0),
    ):
        model = models.build(**experiment.models[name])
        begun = [_make_run(experiment, model, bits, seed) for seed in range(max(SEEDS))]
        device, both = jax.devices()[:1], jax.devices()
        steps = {"one": _repeated(begun[:1], device), "one, cut": _repeated(_cut(begun[:1]), both)}
        for count in SEEDS:
            steps[f"{count} on one device"] = _repeated(begun[:count], device)
        steps["2 on two devices"] = _repeated(begun[:2], both)
        steps["4 on two devices"] = _repeated(begun[:4], both)
        rows = take_turns(steps, "one", rounds=ROUNDS.value)
        for form, row in rows.items():
            seeds = 1 if form.startswith("one") else int(form.split()[0])
            figures[f"{title}, {form}"] = {
                "milliseconds_a_seed": round(row["milliseconds"] / seeds / STEPS, 3),
                "ratio": round(row["ratio"] / seeds, 3),
                "quartiles": [round(x / seeds, 3) for x in row["quartiles"]],
            }
    show("steps of a seed", figures)
    publish(figures, OUT.value, batch=experiment.data.batch_size)


def _make_run(experiment, model, bits, seed):
    """Returns `(plan, state, batch)` of a seed."""
    rng = np.random.default_rng(seed)
    size = experiment.data.batch_size
    images = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    variables, qparams = quantize.as_network(model).init(jax.random.key(seed), images[:1]), {}
    if bits:
        rules = quantize.uniform_rules(bits, bits)
        qparams = quantize.calibrate(model, variables, rules, [images])
        variables, qparams = quantize.prepare(variables, qparams, "lsq")
    rates = {"seed": seed, "steps": 10_000, "learning_rate": 1e-3}
    weights = Weights(variables=variables, qparams=qparams)
    state = create_state(weights, experiment.optimizer, **rates)
    training = Training(
        network=model, optimizer=make_optimizer(experiment.optimizer), objective=Objective()
    )
    plan = Plan(
        training=training,
        dataset=None,
        steps=10_000,
        eval_every=10_000,
        validate=None,
    )
    return plan, state, {"image": images, "label": rng.integers(0, 10, size).astype(np.int32)}


def _cut(begun):
    """With batches cut over two devices (`config.mesh.data=2`)."""
    layout = make_layout(schema.Mesh(data=2))
    training = lambda plan: plan.training.replace(layout=layout)
    return [
        (dataclasses.replace(plan, training=training(plan)), state, batch)
        for plan, state, batch in begun
    ]


def _repeated(begun, devices):
    """A step of the benchmark: ten of training, each of which ends before the next begins."""
    plans, states, batches = zip(*begun, strict=True)
    program = make_program(plans, states, devices=devices)
    layout = plans[0].training.layout
    states = [layout.place(state) for state in states]
    state = jax.tree.map(jnp.copy, program.join(states))

    def take():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = program(state, batches, freeze_norm=False)
            jax.block_until_ready(metrics)
        return metrics

    return take


if __name__ == "__main__":
    run(main)
