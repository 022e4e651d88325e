"""What every task keeps to: shapes, hashing, one function for NumPy and traced arrays, `build`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import tasks
from kdq.fields import ConfigError

RNG = np.random.default_rng(0)
MASK = np.array([1, 1, 1, 0, 1], np.float32)
# (name, options, outputs, labels)
CASES = {
    "classes": ("classification", {}, (5, 7), RNG.integers(0, 7, 5).astype(np.int32)),
    "tokens": ("classification", {}, (5, 3, 4), RNG.integers(0, 4, (5, 3)).astype(np.int32)),
    "labels": ("multilabel", {}, (5, 6), RNG.integers(0, 2, (5, 6)).astype(np.float32)),
    "target": ("regression", {"error": "huber"}, (5, 1), RNG.normal(size=5).astype(np.float32)),
    "targets": (
        "regression",
        {"mean": [1.0, 2.0], "std": [3.0, 4.0]},
        (5, 2),
        RNG.normal(size=(5, 2)).astype(np.float32),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    name, options, shape, labels = CASES[request.param]
    outputs = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    image = np.zeros((5, 2), np.float32)
    return tasks.build(name, **options), outputs, {"image": image, "label": labels, "mask": MASK}


def test_losses_and_scores_have_the_shape_of_the_weights(case):
    task, outputs, batch = case
    weights = task.weights(batch)
    assert task.loss(outputs, batch).shape == weights.shape
    assert weights.sum() == weights.size * 4 / 5
    scores = {**task.scores(outputs, batch), **task.divergence(outputs, outputs + 1)}
    for name, value in scores.items():
        assert value.shape[: weights.ndim] == weights.shape, name
        assert value.shape[weights.ndim :] in ((), outputs.shape[1:]), name
        assert value.dtype == jnp.float32, name
    for metric in (*task.metrics, *task.fidelity):
        assert set(metric.scores) <= scores.keys() or metric.name == "top5_accuracy"
    assert task.primary is not None
    assert task.primary == task.metrics[0]
    assert task.inputs(batch) == (batch["image"],)
    task.check(batch, {}, jax.ShapeDtypeStruct(outputs.shape, outputs.dtype))


def test_a_task_is_a_static_argument_of_jit(case):
    task, outputs, batch = case

    traced = []

    def loss(task, outputs, batch):
        traced.append(task)
        return task.loss(outputs, batch)

    compiled = jax.jit(loss, static_argnums=0)
    value = compiled(task, outputs, batch)
    np.testing.assert_allclose(value, task.loss(outputs, batch), rtol=1e-5, atol=1e-6)
    again = tasks.build(task.name, **vars(task))
    compiled(again, outputs, batch)
    assert len(traced) == 1
    assert again == task


def test_a_model_that_is_its_own_teacher_is_at_no_distance(case):
    task, outputs, batch = case
    scores = task.divergence(outputs, outputs)
    rank = task.weights(batch).ndim
    scores = {k: v.reshape(-1, *v.shape[rank:]) for k, v in scores.items()}
    for metric in task.fidelity:
        assert metric.compute(scores) == (1 if metric.name == "agreement" else 0)


def test_no_gradient_flows_to_a_teacher(case):
    task, outputs, batch = case
    for name, loss in task.distillation.items():
        gradient = jax.grad(lambda t, loss=loss: loss(outputs, t, batch).sum())(outputs + 0.5)
        assert not gradient.any(), name


def test_contributions_of_every_metric_are_influences(case):
    task, outputs, batch = case
    scores = {**task.scores(outputs, batch), **task.divergence(outputs, outputs * 0.5 + 0.1)}
    for metric in (*task.metrics, *task.fidelity):
        if not set(metric.scores) <= scores.keys():
            continue
        flat = {
            k: np.asarray(v, np.float64).reshape(-1, *v.shape[task.weights(batch).ndim :])
            for k, v in scores.items()
        }
        value, parts = metric.compute(flat), metric.contributions(flat)
        assert parts.mean() == pytest.approx(value, rel=1e-9), metric.name
        # With every prediction twice, and one thrice: a step of 1 of 2n.
        thousand = {k: np.repeat(v, 1000, axis=0) for k, v in flat.items()}
        thousand = {k: np.concatenate([v, flat[k][2:3]]) for k, v in thousand.items()}
        moved = metric.compute(thousand) - value
        expected = (parts[2] - value) / len(thousand[metric.scores[0]])
        assert moved == pytest.approx(expected, rel=2e-2, abs=1e-9), metric.name


def test_build_names_the_valid_tasks_and_fields():
    assert tasks.names() == ["classification", "multilabel", "regression"]
    with pytest.raises(ConfigError, match=r"unknown config.task.name: 'regresion' \(did you mean"):
        tasks.build("regresion")
    with pytest.raises(ConfigError, match=r"config.task: 'targets'.*valid: keys, target, error"):
        tasks.build("regression", targets="y")
    with pytest.raises(ConfigError, match=r"config.task.error: 'l1'.*squared, huber"):
        tasks.build("regression", error="l1")
    with pytest.raises(ConfigError, match=r"config.task.delta=0"):
        tasks.build("regression", delta=0)
    assert tasks.build("classification", keys=["tokens", "token_mask"]).keys == (
        "tokens",
        "token_mask",
    )


@pytest.mark.parametrize(
    ("name", "labels", "facts", "outputs", "message"),
    [
        ("classification", np.zeros(4, np.float32), {}, None, "expected integer labels"),
        ("classification", np.array([0, 1, 3]), {}, (3, 3), r"in \[0, 3\), got 0 to 3"),
        ("classification", np.array([0, -1]), {"class_names": "ab"}, None, r"in \[0, 2\), got -1"),
        ("classification", np.array([0, 1]), {"class_names": "ab"}, (2, 3), "data has 2 classes"),
        ("classification", np.array([0, 1]), {}, (2, 1), "of at least 2 classes"),
        ("classification", np.zeros((2, 5), int), {}, (2, 3), r"\(2, 5, 'classes'\)"),
        ("multilabel", np.zeros((2, 3), int), {}, None, "expected float labels"),
        ("multilabel", np.zeros(3, np.float32), {}, None, r"\[batch, labels\]"),
        ("multilabel", np.array([[0, 0.5]], np.float32), {}, None, r"0 and 1, got \[0.5\]"),
        ("multilabel", np.array([[0, np.nan]], np.float32), {}, None, r"0 and 1, got \[nan\]"),
        ("multilabel", np.zeros((2, 3), np.float32), {"class_names": "ab"}, None, "names 2 labels"),
        ("multilabel", np.zeros((2, 3), np.float32), {}, (2, 4), r"outputs \(2, 3\).*\(2, 4\)"),
        ("regression", np.zeros(4, np.int32), {}, None, "expected float targets"),
        ("regression", np.array([0.0, np.nan, np.inf]), {}, None, "got 2 that are not"),
        ("regression", np.zeros((3, 2)), {"target_mean": (0.0,)}, None, "2 targets.*mean of 1"),
        ("regression", np.zeros((3, 2)), {}, (3, 1), r"outputs \(3, 2\), one a target"),
    ],
)
def test_labels_of_the_wrong_kind_are_one_line(name, labels, facts, outputs, message):
    struct = outputs and jax.ShapeDtypeStruct(outputs, jnp.float32)
    with pytest.raises(ConfigError, match=message) as error:
        tasks.build(name).check({"label": labels}, facts, struct)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"task {name}: ")


def test_labels_of_padding_may_be_anything():
    batch = {"label": np.array([[1, -1], [0, 9]]), "token_mask": np.array([[1, 0], [1, 0]])}
    task = tasks.build("classification")
    task.check(batch, {}, jax.ShapeDtypeStruct((2, 2, 3), jnp.float32))
    with pytest.raises(ConfigError, match="got -1 to 9"):
        task.check({"label": batch["label"]}, {}, jax.ShapeDtypeStruct((2, 2, 3), jnp.float32))
