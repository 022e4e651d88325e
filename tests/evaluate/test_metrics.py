"""Metrics against closed forms, and the masked means over batches."""

import host_scores
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_scores import brier, top_k_correct
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, top_k_accuracy_score

from kdq.evaluate import metrics
from kdq.tasks import build


def test_nll_and_correct_by_hand():
    logits = np.log([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]])
    np.testing.assert_allclose(host_scores.nll(logits, [0, 2]), -np.log([0.7, 0.25]))
    assert metrics.correct(logits, [0, 2]).tolist() == [True, False]


def test_kl_divergence_by_hand_and_its_direction():
    p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    np.testing.assert_allclose(host_scores.kl_divergence(np.log(p), np.log(q)), [expected])
    reverse = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    np.testing.assert_allclose(host_scores.kl_divergence(np.log(q), np.log(p)), [reverse])


def test_kl_divergence_of_extreme_logits_is_finite_and_exact():
    p, q = np.array([[1e4, -1e4]]), np.array([[-1e4, 1e4]])
    np.testing.assert_allclose(host_scores.kl_divergence(p, q), [2e4])
    np.testing.assert_array_equal(host_scores.kl_divergence(p, p + 3), [0.0])
    np.testing.assert_allclose(host_scores.nll(p, [1]), [2e4])


def test_a_diverged_model_is_never_correct_and_agrees_with_nobody():
    logits = np.array([[np.nan, np.nan]])
    assert not metrics.correct(logits, [0]).any()
    assert not host_scores.agreement(logits, [[1.0, 0.0]]).any()
    assert np.isnan(host_scores.nll(logits, [0])).all()


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), given"):
        host_scores.nll(np.zeros((1, 3)), [label])
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
def test_outputs_are_those_of_examples_whatever_the_batch_size(problem, size):
    images, labels, student, _ = problem
    logits = images.reshape(10, 4).astype(np.float64) @ student
    batches = list(_batches(images, labels, size))
    outputs = lambda batch: _linear(student, batch["image"])
    np.testing.assert_allclose(metrics.predict(outputs, batches), logits, rtol=1e-5)


def test_no_batches_are_an_error():
    with pytest.raises(ValueError, match="no batches"):
        metrics.predict(lambda batch: batch["image"], [])


@pytest.mark.parametrize("metric", [host_scores.nll, metrics.correct])
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


def _draw(n=300, classes=7, spread=2.0):
    rng = np.random.default_rng(0)
    return spread * rng.normal(size=(n, classes)), rng.integers(0, classes, n)


def test_brier_is_the_sum_of_scikit_learns_scores_of_each_class_against_the_rest():
    logits, labels = _draw()
    p = softmax(logits, axis=-1)
    binary = [brier_score_loss(labels == c, p[:, c]) for c in range(7)]
    scores = brier(logits, labels)
    assert scores.dtype == np.float64
    assert scores.mean() == pytest.approx(sum(binary))
    single = brier_score_loss(np.arange(7) == labels[3], p[3])  # the mean over classes
    assert scores[3] == pytest.approx(7 * single)


def test_brier_at_its_ends():
    certain = [[1e4, -1e4, 0.0]]
    np.testing.assert_allclose(brier(certain, [0]), [0.0], atol=1e-12)
    np.testing.assert_allclose(brier(certain, [1]), [2.0])
    np.testing.assert_allclose(brier(np.zeros((1, 4)), [2]), [3 * 0.25**2 + 0.75**2])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_scikit_learns_for_each_example(k):
    logits, labels = _draw(n=40)
    expected = [
        top_k_accuracy_score(labels[i : i + 1], logits[i : i + 1], k=k, labels=np.arange(7))
        for i in range(40)
    ]
    assert top_k_correct(logits, labels, k).tolist() == expected
    assert 0 < np.mean(expected) < 1
    assert top_k_correct(logits, labels, 7).all()


def test_top_1_is_correct_also_of_ties_and_nans():
    logits = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, np.nan, 1.0], [2.0, 0.0, 5.0]])
    labels = [0, 1, 1, 2]
    np.testing.assert_array_equal(top_k_correct(logits, labels, 1), metrics.correct(logits, labels))
    assert top_k_correct(logits, labels, 1).tolist() == [True, False, False, True]
    assert top_k_correct(logits, labels, 2).tolist() == [True, True, False, True]
    assert top_k_correct(logits, labels, 3).tolist() == [True, True, False, True]


@pytest.mark.parametrize("k", [0, 4])
def test_k_that_is_no_number_of_classes_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must be in \[1, 3\], given {k}"):
        top_k_correct(np.zeros((2, 3)), [0, 1], k)


@pytest.mark.parametrize("measure", [brier, host_scores.score, lambda x, y: top_k_correct(x, y, 1)])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3)), [0], r"given \(2, 3\) and \(1,\)"),
        (np.zeros(3), [0], r"given \(3,\) and \(1,\)"),
        (np.zeros((2, 3)), [0, 3], r"in \[0, 3\), given 0 to 3"),
        (np.zeros((2, 3)), [0.0, 1.0], "must be integers, given float64"),
    ],
)
def test_labels_that_do_not_fit_the_logits_are_refused(measure, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        measure(logits, labels)


def test_scores_of_the_host_are_named_as_those_of_the_task():
    logits, labels = _draw()
    scores = host_scores.score(logits, labels, logits[::-1])
    task = build("classification")
    device = task.scores(logits, {"label": labels}) | task.divergence(logits, logits[::-1])
    assert set(scores) - {"teacher_correct"} <= set(device)
    for name in set(scores) - {"teacher_correct"}:
        np.testing.assert_allclose(device[name], scores[name], rtol=1e-4, atol=1e-6, err_msg=name)
