"""Seeds as one program: each ends as by itself, whatever befalls the others."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import resume_training
from compilations import count_compilations
from resume_training import EVAL_EVERY, STEPS

from kdq import config
from kdq.train import loop, together
from kdq.train.step import NonFiniteError

pytestmark = pytest.mark.slow
# Not Adam, whose first steps are of one size however small the gradient: rounding would tell.
SGD = config.Optimizer(name="sgd", scale_rule="sgd")
SEEDS = (0, 1, 2)
make = functools.partial(resume_training.make, learning_rate=0.05, optimizer=SGD)


def folders(root, count=3):
    found = [root / str(seed) for seed in range(count)]
    for folder in found:
        folder.mkdir(parents=True, exist_ok=True)
    return found


def fit(begun, workdirs, **options):
    options = {"checkpoint_seconds": 0.0, **options}
    return loop.fit_together(*zip(*begun, strict=True), workdirs, **options)


def curve(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_all_alike(fits, workdirs, by_themselves, which):
    for i in which:
        assert_alike(fits[i], by_themselves[0][i], workdirs[i], by_themselves[1][i])


def assert_alike(found, expected, workdir, expected_workdir):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found.last, expected.last)
    jax.tree.map(close, found.selected.weights, expected.selected.weights)
    assert found.selected.step == expected.selected.step
    assert found.last_step == expected.last_step == STEPS
    for ours, theirs in zip(curve(workdir), curve(expected_workdir), strict=True):
        assert ours.keys() == theirs.keys()
        close(list(ours.values()), list(theirs.values()))


@pytest.fixture(scope="module")
def by_themselves(tmp_path_factory):
    workdirs = folders(tmp_path_factory.mktemp("alone"))
    fits = [loop.fit(*make(seed=s), workdirs[s], checkpoint_seconds=0.0) for s in SEEDS]
    ends = [np.asarray(one.last.variables["params"]["head"]["kernel"]) for one in fits]
    assert all(np.abs(a - ends[0]).max() > 1e-2 for a in ends[1:])  # else nothing is shown
    return fits, workdirs


def test_each_seed_ends_as_by_itself_after_one_compilation(by_themselves, tmp_path):
    workdirs = folders(tmp_path)
    with count_compilations("_steps") as compiled:
        fits = fit([make(seed=seed) for seed in SEEDS], workdirs)
    assert len(compiled) == 1
    assert_all_alike(fits, workdirs, by_themselves, range(len(fits)))


def test_compiling_is_shared_and_no_part_of_the_seconds(tmp_path):
    pause, workdirs = 0.02, folders(tmp_path)
    begun = [make(seed=seed) for seed in SEEDS]
    tracing = 3.0  # far more than what a busy machine adds to the seconds of a run

    class SlowToTrace(type(begun[0][0].training.network)):
        def __call__(self, *inputs, **options):
            time.sleep(tracing)
            return super().__call__(*inputs, **options)

    model = SlowToTrace(num_classes=3, widths=(3, 4), batch_norm=True)
    begun = [
        (dataclasses.replace(plan, training=plan.training.replace(network=model)), state)
        for plan, state in begun
    ]
    fits = fit(begun, workdirs, on_step=lambda _: time.sleep(pause))
    again = fit(begun, folders(tmp_path / "again"), on_step=lambda _: time.sleep(pause))
    assert sum(one.compile_seconds for one in fits) >= tracing
    assert len({one.compile_seconds for one in fits}) == 1
    assert sum(one.seconds for one in fits) >= STEPS * pause
    assert abs(sum(a.seconds - b.seconds for a, b in zip(fits, again, strict=True))) < tracing / 2


def test_one_that_fails_leaves_the_others_alone(by_themselves, tmp_path):
    def spoil(dataset):
        def change(index, batch):
            return {**batch, "image": batch["image"] * (np.nan if index == 6 else 1)}

        return dataset.map_with_index(change)

    workdirs = folders(tmp_path)
    fits = fit([make(seed=0), make(seed=1, wrap=spoil), make(seed=2)], workdirs)
    assert isinstance(fits[1], NonFiniteError)
    assert str(fits[1]) == "NaN or infinity at step 7, first in the input images"
    assert [e["step"] for e in curve(workdirs[1]) if "loss" in e] == list(range(1, 7))
    assert [p.name for p in (workdirs[1] / "checkpoints").iterdir()] == ["4"]
    assert_all_alike(fits, workdirs, by_themselves, (0, 2))


def test_runs_that_were_cut_off_at_different_steps_go_on_together(by_themselves, tmp_path):
    def stop_at(last):
        def stop(step):
            if step == last:
                raise KeyboardInterrupt

        return stop

    workdirs = folders(tmp_path)
    for seed, last in zip(SEEDS, (18, 14, 14), strict=True):
        with pytest.raises(KeyboardInterrupt):
            loop.fit(*make(seed=seed), workdirs[seed], checkpoint_seconds=0, on_step=stop_at(last))
    steps = []
    fits = fit([make(seed=seed) for seed in SEEDS], workdirs, on_step=steps.append)
    assert steps == list(range(13, STEPS + 1))
    assert_all_alike(fits, workdirs, by_themselves, range(len(fits)))
    assert sorted(p.name for p in (workdirs[0] / "checkpoints").iterdir()) == ["20", "24"]


def test_runs_without_a_step_in_common_begin_again(by_themselves, tmp_path):
    workdirs = folders(tmp_path, 2)
    loop.fit(*make(seed=0), workdirs[0])
    steps = []
    fits = fit([make(seed=seed) for seed in (0, 1)], workdirs, on_step=steps.append)
    assert steps == list(range(1, STEPS + 1))
    assert_all_alike(fits, workdirs, by_themselves, range(len(fits)))


@pytest.mark.parametrize("change", [{"steps": STEPS + 1}, {"eval_every": EVAL_EVERY + 1}])
def test_unlike_plans_are_refused(tmp_path, change):
    first, (plan, state) = make(), make(seed=1)
    with pytest.raises(ValueError, match="must be alike"):
        fit([first, (dataclasses.replace(plan, **change), state)], folders(tmp_path, 2))


def test_what_tells_plans_apart():
    alike = together.signature(*make())
    assert together.signature(*make(seed=1)) == alike
    plan, state = make(learning_rate=0.1)  # in the state: a number as weights are
    assert together.signature(plan, state) == alike
    doubled = jax.tree.map(lambda x: 2 * x, plan.training.objective)
    training = plan.training.replace(objective=doubled)
    assert together.signature(dataclasses.replace(plan, training=training), state) != alike
    wider = state.replace(params={**state.params, "more": np.zeros(1, np.float32)})
    assert together.signature(plan, wider) != alike


def test_spread_over_devices(by_themselves, tmp_path):
    """Two seeds on each of two devices."""
    # The test helpers that this file imports, which pytest's own settings do not give to a script.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.getenv("PYTHONPATH"))))
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = path
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "devices"]
    for seed in SEEDS:
        ours, theirs = curve(tmp_path / str(seed)), curve(by_themselves[1][seed])
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(list(one.values()), list(other.values()), atol=1e-5)


def main(root):
    """Four seeds on the devices that there are."""
    states = [make(seed=seed)[1] for seed in range(4)]
    program = together.make_program([make(seed=seed)[0] for seed in range(4)], states)
    print(len(program.join(states).step.sharding.device_set), "devices")
    fit([make(seed=seed) for seed in range(4)], folders(root, 4))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
