"""Metrics against closed forms, and the masked means over batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.evaluate import metrics


def test_nll_and_correct_by_hand():
    logits = np.log([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]])
    np.testing.assert_allclose(metrics.nll(logits, [0, 2]), -np.log([0.7, 0.25]))
    assert metrics.correct(logits, [0, 2]).tolist() == [True, False]


def test_kl_divergence_by_hand_and_its_direction():
    p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    np.testing.assert_allclose(metrics.kl_divergence(np.log(p), np.log(q)), [expected])
    reverse = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    np.testing.assert_allclose(metrics.kl_divergence(np.log(q), np.log(p)), [reverse])


def test_kl_divergence_of_extreme_logits_is_finite_and_exact():
    p, q = np.array([[1e4, -1e4]]), np.array([[-1e4, 1e4]])
    np.testing.assert_allclose(metrics.kl_divergence(p, q), [2e4])
    np.testing.assert_array_equal(metrics.kl_divergence(p, p + 3), [0.0])
    np.testing.assert_allclose(metrics.nll(p, [1]), [2e4])


def test_a_diverged_model_is_never_correct_and_agrees_with_nobody():
    logits = np.array([[np.nan, np.nan]])
    assert not metrics.correct(logits, [0]).any()
    assert not metrics.agreement(logits, [[1.0, 0.0]]).any()
    assert np.isnan(metrics.nll(logits, [0])).all()


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), given"):
        metrics.nll(np.zeros((1, 3)), [label])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), given"):
        metrics.correct(np.zeros((1, 3)), [label])


def _batches(images, labels, size):
    """Batches of one size; the last one is padded with copies of the first example."""
    for start in range(0, len(images), size):
        index = np.arange(start, start + size)
        inside = index < len(images)
        index = np.where(inside, index, 0)
        yield {
            "image": jnp.asarray(images[index]),
            "label": labels[index],
            "mask": inside.astype(np.float32),
        }


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(10, 2, 2, 1)).astype(np.float32)
    labels = rng.integers(0, 3, 10).astype(np.int32)
    student = rng.normal(size=(4, 3)).astype(np.float32)
    teacher = rng.normal(size=(4, 3)).astype(np.float32)
    return images, labels, student, teacher


@jax.jit
def _linear(weights, images):
    return images.reshape(images.shape[0], -1) @ weights


@pytest.mark.parametrize("size", [4, 5, 16])
def test_means_are_over_examples_whatever_the_batch_size(problem, size):
    images, labels, student, _ = problem
    logits = images.reshape(10, 4).astype(np.float64) @ student
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    batches = list(_batches(images, labels, size))
    np.testing.assert_allclose(metrics.predict(_linear, student, batches), logits, rtol=1e-5)
    assert metrics.evaluate(_linear, student, batches) == pytest.approx(
        {
            "accuracy": np.mean(p.argmax(-1) == labels),
            "nll": np.mean(-np.log(p[np.arange(10), labels])),
        },
        rel=1e-5,
    )


def test_no_examples_is_an_error(problem):
    images, labels, student, _ = problem
    with pytest.raises(ValueError, match="no example that is not masked"):
        metrics.evaluate(_linear, student, [])
    masked = [{**b, "mask": b["mask"] * 0} for b in _batches(images, labels, 4)]
    with pytest.raises(ValueError, match="no example that is not masked"):
        metrics.evaluate(_linear, student, masked)
    with pytest.raises(ValueError, match="no batches"):
        metrics.predict(_linear, student, [])


@pytest.mark.parametrize("metric", [metrics.nll, metrics.correct])
def test_labels_of_other_examples_are_refused(metric):
    with pytest.raises(ValueError, match=r"given \(4, 3\) and \(1,\)"):
        metric(np.zeros((4, 3)), [1])


@pytest.mark.parametrize("size", [1, 4, 10, 64])
def test_in_batches_restores_the_order_and_calls_with_one_shape(size):
    x, y = np.arange(10.0), np.arange(20.0).reshape(10, 2)
    shapes = set()

    def fn(x, y):
        shapes.add((x.shape, y.shape))
        return {"sum": x[:, None] + y, "square": x**2}

    result = metrics.in_batches(fn, x, y, batch_size=size)
    np.testing.assert_array_equal(result["sum"], [[3 * i, 3 * i + 1] for i in range(10)])
    np.testing.assert_array_equal(result["square"], [i * i for i in range(10)])
    rows = min(size, 10)
    assert shapes == {((rows,), (rows, 2))}


def test_in_batches_refuses_what_has_no_batches():
    with pytest.raises(ValueError, match="lengths must be equal and positive"):
        metrics.in_batches(np.add, np.zeros(3), np.zeros(2), batch_size=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, given 0"):
        metrics.in_batches(np.abs, np.zeros(3), batch_size=0)
