"""The objective against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.distill import schedule, term
from kdq.distill.capture import Outputs
from kdq.train.objective import Objective


def taught(alpha, temperature):
    """A function `(logits, batch, teacher's logits) -> (loss, sums)`."""
    fields = {"loss": "kl", "weight": alpha, "temperature": temperature}
    objective = Objective(
        task_weight=schedule.constant(1 - alpha), terms=(term.build("kl", fields, "terms.kl"),)
    )

    def call(logits, batch, teacher):
        teacher = None if teacher is None else Outputs(logits=teacher)
        return objective(Outputs(logits=logits), teacher, batch)[:2]

    return call


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def oracle(logits, labels, teacher, alpha, temperature, mask):
    """Loss and gradient of (1 - α) CE + α T² KL over the examples that the mask keeps."""
    rows = np.arange(len(labels))
    log_q = log_softmax(logits)
    task = -log_q[rows, labels]
    d_task = np.exp(log_q)
    d_task[rows, labels] -= 1
    log_p, log_q = log_softmax(teacher / temperature), log_softmax(logits / temperature)
    distill = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
    d_distill = temperature * (np.exp(log_q) - np.exp(log_p))
    each = (1 - alpha) * task + alpha * distill
    d_each = (1 - alpha) * d_task + alpha * d_distill
    sums = {"task_loss": task, "kl_loss": distill}
    sums = {name: (mask * value).sum() for name, value in sums.items()}
    return (mask * each).sum() / mask.sum(), mask[:, None] * d_each / mask.sum(), sums


def case(scale=3.0, size=9, classes=5):
    rng = np.random.default_rng(0)
    logits, teacher = (scale * rng.normal(size=(size, classes)) for _ in range(2))
    mask = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0][:size], np.float64)
    return logits.astype(np.float32), rng.integers(0, classes, size), teacher, mask


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_value_gradient_and_sums(alpha, temperature, masked):
    logits, labels, teacher, mask = case()
    mask = mask if masked else np.ones_like(mask)
    batch = {"label": labels, **({"mask": mask.astype(np.float32)} if masked else {})}
    objective = taught(alpha, temperature)
    (loss, sums), gradient = jax.value_and_grad(objective, has_aux=True)(
        jnp.asarray(logits), batch, jnp.asarray(teacher, jnp.float32)
    )
    expected = oracle(logits, labels, teacher, alpha, temperature, mask)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-6)
    for name, value in expected[2].items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)
    assert Objective().counts(batch)["task_loss"] == mask.sum()
    assert sums["correct"] == (mask * (logits.argmax(-1) == labels)).sum()


def test_without_a_teacher_there_are_only_labels():
    logits, labels, _, _ = case()
    outputs = Outputs(logits=jnp.asarray(logits))
    loss, sums, memory = Objective()(outputs, None, {"label": labels})
    expected = -log_softmax(logits)[np.arange(len(labels)), labels]
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    assert set(sums) == {"task_loss", "correct"}
    np.testing.assert_allclose(loss * len(labels), sums["task_loss"], rtol=1e-6)
    assert memory == {}


def test_terms_without_a_teacher_are_refused():
    with pytest.raises(ValueError, match=r"terms \['kl'\] need a teacher"):
        taught(0.5, 2.0)(jnp.zeros((2, 3)), {"label": np.zeros(2, np.int32)}, None)


def test_label_smoothing_spreads_the_target():
    logits, labels, _, _ = case()
    outputs = Outputs(logits=jnp.asarray(logits))
    loss, _, _ = Objective(options={"label_smoothing": 0.2})(outputs, None, {"label": labels})
    target = 0.8 * np.eye(5)[labels] + 0.2 / 5
    np.testing.assert_allclose(loss, -(target * log_softmax(logits)).sum(-1).mean(), rtol=1e-5)


def test_weights_follow_their_schedules():
    logits, labels, teacher, _ = case()
    student, taught_by = Outputs(logits=jnp.asarray(logits)), Outputs(logits=jnp.asarray(teacher))
    build = lambda name, weight: term.build(name, {"loss": name, "weight": weight}, name)
    objective = Objective(
        task_weight=schedule.linear(1.0, 0.0),
        terms=(
            build("soft_mse", {"kind": "phases", "values": (0.0, 3.0), "starts": (0.0, 0.5)}),
            build("hard_label", 2.0),
        ),
        steps=10.0,
    )
    for step, task, mse in ((0, 1.0, 0.0), (4, 0.6, 0.0), (5, 0.5, 3.0), (10, 0.0, 3.0)):
        loss, sums, _ = objective(student, taught_by, {"label": labels}, step=step)
        expected = (
            task * sums["task_loss"] + mse * sums["soft_mse_loss"] + 2 * sums["hard_label_loss"]
        )
        np.testing.assert_allclose(loss, expected / len(labels), rtol=1e-5)
    assert float(sums["soft_mse_loss"]) > 0


def test_no_gradient_reaches_the_teacher():
    logits, labels, teacher, _ = case()
    objective = taught(0.5, 2.0)
    value = lambda t: objective(jnp.asarray(logits), {"label": labels}, t)[0]
    np.testing.assert_array_equal(jax.grad(value)(jnp.asarray(teacher, jnp.float32)), 0)


def test_masked_rows_do_not_matter_even_if_huge_and_an_empty_batch_is_zero():
    logits, labels, teacher, mask = case()
    spoiled = np.where(mask[:, None] == 0, 1e4, logits).astype(np.float32)
    objective = taught(0.5, 2.0)
    batch = {"label": labels, "mask": mask.astype(np.float32)}
    clean, _ = objective(jnp.asarray(logits), batch, jnp.asarray(teacher))
    dirty, _ = objective(jnp.asarray(spoiled), batch, jnp.asarray(teacher))
    np.testing.assert_allclose(clean, dirty, rtol=1e-6)
    nothing, sums = objective(
        jnp.asarray(logits),
        {"label": labels, "mask": np.zeros(len(labels), np.float32)},
        jnp.asarray(teacher),
    )
    assert float(nothing) == 0
    assert float(sums["correct"]) == 0


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels, teacher, mask = case()
    half = jnp.asarray(logits, jnp.bfloat16)
    loss, _ = taught(0.5, 2.0)(half, {"label": labels}, jnp.asarray(teacher))
    expected = oracle(np.asarray(half, np.float64), labels, teacher, 0.5, 2.0, np.ones_like(mask))[
        0
    ]
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
