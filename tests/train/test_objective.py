"""The objective against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.train.objective import Objective


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
    sums = {"task_loss": task, "distill_loss": distill, "loss": each}
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
    objective = Objective(alpha=alpha, temperature=temperature)
    (loss, sums), gradient = jax.value_and_grad(objective, has_aux=True)(
        jnp.asarray(logits), batch, jnp.asarray(teacher, jnp.float32)
    )
    expected = oracle(logits, labels, teacher, alpha, temperature, mask)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-6)
    for name, value in expected[2].items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)
    assert sums["count"] == mask.sum()
    assert sums["correct"] == (mask * (logits.argmax(-1) == labels)).sum()


def test_without_a_teacher_alpha_is_unused():
    logits, labels, _, _ = case()
    loss, sums = Objective(alpha=0.9, temperature=4.0)(jnp.asarray(logits), {"label": labels}, None)
    expected = -log_softmax(logits)[np.arange(len(labels)), labels]
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    assert "distill_loss" not in sums
    np.testing.assert_allclose(sums["loss"], sums["task_loss"])


def test_no_gradient_reaches_the_teacher():
    logits, labels, teacher, _ = case()
    objective = Objective(alpha=0.5, temperature=2.0)
    value = lambda t: objective(jnp.asarray(logits), {"label": labels}, t)[0]
    np.testing.assert_array_equal(jax.grad(value)(jnp.asarray(teacher, jnp.float32)), 0)


def test_masked_rows_do_not_matter_even_if_huge_and_an_empty_batch_is_zero():
    logits, labels, teacher, mask = case()
    spoiled = np.where(mask[:, None] == 0, 1e4, logits).astype(np.float32)
    objective = Objective(alpha=0.5, temperature=2.0)
    batch = {"label": labels, "mask": mask.astype(np.float32)}
    clean, _ = objective(jnp.asarray(logits), batch, jnp.asarray(teacher))
    dirty, _ = objective(jnp.asarray(spoiled), batch, jnp.asarray(teacher))
    np.testing.assert_allclose(clean, dirty, rtol=1e-6)
    nothing, sums = objective(
        jnp.asarray(logits), {"label": labels, "mask": np.zeros(len(labels), np.float32)}, None
    )
    assert float(nothing) == 0
    assert float(sums["count"]) == 0


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels, teacher, mask = case()
    half = jnp.asarray(logits, jnp.bfloat16)
    loss, _ = Objective(alpha=0.5, temperature=2.0)(half, {"label": labels}, jnp.asarray(teacher))
    expected = oracle(np.asarray(half, np.float64), labels, teacher, 0.5, 2.0, np.ones_like(mask))[
        0
    ]
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
