"""`fit`: a run that is interrupted ends as one that is not; NaN is named; selection is right."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resume_training
from resume_training import EVAL_EVERY, STEPS

from kdq.distill.teacher import Stored
from kdq.quantize.network import Weights
from kdq.train import loop
from kdq.train.checkpoint import Checkpointer
from kdq.train.step import NonFiniteError


class Interrupted(Exception):
    pass


def at(step):
    def stop(done):
        if done == step:
            raise Interrupted

    return stop


def fit(workdir, on_step=lambda step: None, checkpoint_seconds=0.0, **options):
    workdir.mkdir(exist_ok=True)
    plan, state = resume_training.make(**options)
    return loop.fit(plan, state, workdir, checkpoint_seconds=checkpoint_seconds, on_step=on_step)


def final_state(workdir):
    """Everything in the last checkpoint: parameters, statistics, scales, optimizer, selection."""
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        step, trees, record = checkpointer.restore({"state": None, "selected": None})
    record.pop("seconds")
    record.pop("compile_seconds")
    return step, trees, record


def curve(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_same_run(a, b, workdir_a, workdir_b):
    (step_a, trees_a, record_a), (step_b, trees_b, record_b) = map(
        final_state, (workdir_a, workdir_b)
    )
    assert step_a == step_b == STEPS
    state = trees_a["state"]
    assert {"params", "model_state", "scales", "opt_state", "qparams"} <= set(state)
    assert state["model_state"]["batch_stats"]
    assert state["scales"]
    assert_equal(trees_a, trees_b)
    assert record_a == record_b
    assert_equal((a.last.variables, a.last.qparams), (b.last.variables, b.last.qparams))
    best_a, best_b = a.selected, b.selected
    assert (best_a.step, best_a.metrics) == (best_b.step, best_b.metrics)
    assert_equal(best_a.weights.variables, best_b.weights.variables)
    curves = [(w / "metrics.jsonl").read_text() for w in (workdir_a, workdir_b)]
    assert curves[0] == curves[1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    return fit(workdir), workdir


def test_the_unbroken_run_learns_and_logs_each_step(unbroken):
    result, workdir = unbroken
    entries = curve(workdir)
    steps = [e["step"] for e in entries if "loss" in e]
    assert steps == list(range(1, STEPS + 1))
    validations = [e for e in entries if "validation_nll" in e]
    assert [e["step"] for e in validations] == list(range(EVAL_EVERY, STEPS + 1, EVAL_EVERY))
    # Selected: the most accurate; between equals the lower NLL; between those the earlier.
    best = max(validations, key=lambda e: (e["validation_accuracy"], -e["validation_nll"]))
    assert result.selected.step == best["step"]
    assert result.selected.metrics["nll"] == best["validation_nll"]
    assert result.last_step == STEPS
    plan, start = resume_training.make()
    before = plan.validate(Weights(variables=start.variables, qparams=start.quantizers))
    assert result.selected.metrics["nll"] < before["nll"]
    # What was selected is what was measured.
    assert plan.validate(result.selected.weights) == result.selected.metrics


# Before any checkpoint; between two; at the last step.
@pytest.mark.parametrize(
    "step",
    [pytest.param(2, marks=pytest.mark.slow), 10, pytest.param(STEPS, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_ends_as_the_unbroken_one(unbroken, tmp_path, step):
    result, workdir = unbroken
    with pytest.raises(Interrupted):
        fit(tmp_path, at(step))
    steps = []
    again = fit(tmp_path, steps.append)
    first = (step - 1) // EVAL_EVERY * EVAL_EVERY + 1  # the checkpoint of this step comes after it
    assert steps == list(range(first, STEPS + 1))
    assert_same_run(result, again, workdir, tmp_path)


def test_a_killed_process_ends_as_the_unbroken_one(unbroken, tmp_path):
    result, workdir = unbroken
    command = [sys.executable, resume_training.__file__, str(tmp_path), "14"]
    process = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert not list(Path(tmp_path).glob("checkpoints/24"))
    steps = []
    again = fit(tmp_path, steps.append)
    assert steps[0] in (5, 9, 13)  # the last one or two may not have been on disk yet
    assert_same_run(result, again, workdir, tmp_path)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_only_steps(unbroken, tmp_path, caplog):
    result, workdir = unbroken
    with pytest.raises(Interrupted):
        fit(tmp_path, at(14))
    for file in (tmp_path / "checkpoints" / "12").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    steps = []
    again = fit(tmp_path, steps.append)
    assert steps[0] == 9
    assert "checkpoints/12 can't be read" in caplog.text
    assert_same_run(result, again, workdir, tmp_path)


def test_a_finished_run_takes_no_step_and_gives_the_same(unbroken, tmp_path):
    result, workdir = unbroken
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    steps = []
    again = fit(tmp_path, steps.append)
    assert steps == []
    assert_same_run(result, again, workdir, tmp_path)


def test_checkpoints_are_as_rare_as_asked(tmp_path):
    fit(tmp_path, checkpoint_seconds=1e6)
    names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert names == [str(STEPS)]


# Seconds.

TRACING, EACH_STEP = 1.0, 0.02  # s


class SlowToTrace(type(resume_training.MODEL)):
    """The same network, whose compilation takes so long at least."""

    def __call__(self, *inputs, **options):
        time.sleep(TRACING)
        return super().__call__(*inputs, **options)


def timed(workdir):
    plan, state = resume_training.make()
    fields = {"num_classes": 3, "widths": (3, 4), "batch_norm": True}
    training = plan.training.replace(network=SlowToTrace(**fields))
    plan = dataclasses.replace(plan, training=training)
    workdir.mkdir()
    return loop.fit(plan, state, workdir, on_step=lambda _: time.sleep(EACH_STEP))


def test_compiling_is_no_part_of_the_seconds_of_training(tmp_path):
    first, second = timed(tmp_path / "first"), timed(tmp_path / "second")
    assert first.compile_seconds >= TRACING
    assert second.compile_seconds < TRACING / 2  # the same program
    for fit_ in (first, second):
        assert fit_.seconds >= STEPS * EACH_STEP
    assert abs(first.seconds - second.seconds) < TRACING / 2


def test_a_checkpoint_that_does_not_tell_compiling_apart_is_gone_on_from(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path / "new", at(10))
    _, state = resume_training.make()
    like = {"state": state, "selected": loop._parts(state)}
    with Checkpointer(tmp_path / "new" / "checkpoints") as checkpointer:
        trees, record = checkpointer.read(8, like)
    assert record["compile_seconds"] >= 0
    del record["compile_seconds"]  # as versions before had it
    with Checkpointer(tmp_path / "old" / "checkpoints") as checkpointer:
        checkpointer.save(8, trees, {**record, "seconds": 100.0})
    steps = []
    again = fit(tmp_path / "old", steps.append)
    assert steps[0] == 9
    assert again.seconds > 100
    assert again.compile_seconds is None


# NaN and infinity.


def poisoned(plan, state, layer):
    params = jax.tree.map(lambda p: p, state.params)
    params[layer]["kernel"] = params[layer]["kernel"].at[0].set(jnp.inf)
    return plan, state.replace(params=params)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [pytest.param("conv_1", marks=pytest.mark.slow), "head"])
def test_infinity_in_a_weight_is_named(tmp_path, layer):
    plan, state = poisoned(*resume_training.make(), layer)
    with pytest.raises(NonFiniteError, match=rf"at step 1, first in the parameters of .*'{layer}'"):
        loop.fit(plan, state, tmp_path)


def spoil(step, **values):
    """A change to the data set: the batch of a step (from 1) holds `values`."""

    def wrap(dataset):
        def change(index, batch):
            if index + 1 != step:
                return batch
            spoiled = {name: np.full_like(batch[name], value) for name, value in values.items()}
            return {**batch, **spoiled}

        return dataset.map_with_index(change)

    return wrap


def test_nan_in_the_images_of_one_batch_is_named(tmp_path):
    with pytest.raises(NonFiniteError, match=r"at step 7, first in the input images"):
        fit(tmp_path, wrap=spoil(7, image=np.nan))
    # What was written is what was before: two whole intervals less the step that failed.
    entries = curve(tmp_path)
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 7))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    # Again, from the checkpoint: the same step, the same place.
    with pytest.raises(NonFiniteError, match=r"at step 7, first in the input images"):
        fit(tmp_path, wrap=spoil(7, image=np.nan))


def test_nan_from_a_cached_teacher_is_named(tmp_path):
    def wrap(dataset):
        def add(index, batch):
            logits = np.full((len(batch["label"]), 3), np.nan if index == 2 else 0.0, np.float32)
            return {**batch, "teacher_logits": logits}

        return dataset.map_with_index(add)

    plan, state = resume_training.make(wrap=wrap)
    plan = dataclasses.replace(plan, training=plan.training.replace(teacher=Stored()))
    with pytest.raises(NonFiniteError, match=r"at step 3, first in what the teacher says"):
        loop.fit(plan, state, tmp_path)


def test_nan_from_a_live_teacher_is_named(tmp_path):
    plan, state = resume_training.make()
    spoiled = jax.tree.map(lambda p: p * np.nan, plan.training.teacher)
    plan = dataclasses.replace(plan, training=plan.training.replace(teacher=spoiled))
    with pytest.raises(NonFiniteError, match=r"at step 1, first in what the teacher says"):
        loop.fit(plan, state, tmp_path)


def test_a_rate_that_explodes_is_named(tmp_path):
    with pytest.raises(NonFiniteError, match=r"at step [2-9], first in the \w+ of layer '\w+'"):
        fit(tmp_path, learning_rate=1e36)


def test_weights_that_explode_in_the_last_step_are_no_result(tmp_path):
    """The step's own loss is finite; what it leaves behind is not."""
    plan, state = resume_training.make(learning_rate=1e36)
    plan = dataclasses.replace(plan, steps=1)
    with pytest.raises(NonFiniteError, match="NaN or infinity on validation after step 1"):
        loop.fit(plan, state, tmp_path)
