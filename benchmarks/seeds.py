"""Several seeds of one arm as one program, against one after another.

    python benchmarks/seeds.py --out=benchmarks/results/seeds.json

The digits student (float, and quantized to W4A4) and teacher: one step of each seed by itself; all
by one `jax.vmap`; and one seed on each of two virtual devices by `shard_map`. Milliseconds are of a
step of one seed; the forms take turns.
"""

import os

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
)

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from interleaved import publish, run, show, take_turns
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdq import config, models, quantize
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.state import create_state
from kdq.train.step import train_step

OUT = flags.DEFINE_string("out", None, "JSON file for the figures; printed only if not given.")
ROUNDS = flags.DEFINE_integer("rounds", 30, "Timed rounds of each network.")
SEEDS = (2, 5)
STEPS = 10  # of training, in a turn
BY_SEED = PartitionSpec("seed")
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
        given = [_begin(experiment, model, bits, seed) for seed in range(max(SEEDS))]
        steps = {"one": _repeated(_one, model, experiment, given[:1])}
        for count in SEEDS:
            steps[f"{count} by vmap"] = _repeated(_by_vmap, model, experiment, given[:count])
        steps["2 by shard_map"] = _repeated(_by_device, model, experiment, given[:2])
        found = take_turns(steps, "one", rounds=ROUNDS.value)
        for form, row in found.items():
            seeds = 1 if form == "one" else int(form.split()[0])
            figures[f"{title}, {form}"] = {
                "milliseconds_a_seed": round(row["milliseconds"] / seeds / STEPS, 3),
                "ratio": round(row["ratio"] / seeds, 3),
                "quartiles": [round(x / seeds, 3) for x in row["quartiles"]],
            }
    show("steps of a seed", figures)
    publish(figures, OUT.value, batch=experiment.data.batch_size)


def _begin(experiment, model, bits, seed):
    """`(state, batch)` of a seed."""
    rng = np.random.default_rng(seed)
    size = experiment.data.batch_size
    images = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    variables, qparams = model.init(jax.random.key(seed), images[:1], train=False), {}
    if bits:
        rules = quantize.uniform_rules(bits, bits)
        qparams = quantize.calibrate(model, variables, rules, [images], train=False)
        variables, qparams = quantize.prepare(variables, qparams, "lsq")
    rates = {"seed": seed, "steps": 10_000, "learning_rate": 1e-3}
    state = create_state(variables, qparams, experiment.optimizer, **rates)
    return state, {"image": images, "label": rng.integers(0, 10, size).astype(np.int32)}


def _repeated(make, model, experiment, given):
    """A step of the benchmark: ten of training, each of which ends before the next begins."""
    plain = functools.partial(
        train_step.__wrapped__,
        model=model,
        teacher=None,
        objective=Objective(),
        optimizer=make_optimizer(experiment.optimizer),
    )
    step, state, batch = make(lambda state, batch: plain(state, None, batch), given)
    state = jax.tree.map(jnp.copy, state)

    def take():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
        return metrics

    return take


def _one(step, given):
    return jax.jit(step, donate_argnums=0), *given[0]


def _by_vmap(step, given):
    return jax.jit(jax.vmap(step), donate_argnums=0), *_stacked(given)


def _by_device(step, given):
    mesh = jax.make_mesh((len(given),), ("seed",), axis_types=(AxisType.Auto,))

    def own(state, batch):
        alone = jax.tree.map(lambda x: x[0], (state, batch))
        return jax.tree.map(lambda x: x[None], step(*alone))

    program = jax.shard_map(own, mesh=mesh, in_specs=BY_SEED, out_specs=BY_SEED, check_vma=False)
    state, batch = jax.device_put(_stacked(given), NamedSharding(mesh, BY_SEED))
    return jax.jit(program, donate_argnums=0), state, batch


def _stacked(given):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)


if __name__ == "__main__":
    run(main)
