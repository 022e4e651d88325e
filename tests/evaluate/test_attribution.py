"""Attributions in closed form, their completeness, and SciPy's rank correlation."""

import functools
import gc
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cosine as cosine_distance
from scipy.stats import spearmanr

from kdq.evaluate import attribution
from kdq.evaluate.attribution import gradient_times_input, integrated_gradients

SHAPE = (2, 3, 2)


def _images(n=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, *SHAPE)).astype(np.float32)


def _weights(classes=4, seed=1):
    return np.random.default_rng(seed).normal(size=(12, classes)).astype(np.float32)


def _linear(weights, bias=0.5):
    return lambda images: images.reshape(len(images), -1) @ weights + bias


def _smooth(weights):
    """Two layers, so that the gradient changes along a path."""
    head = np.random.default_rng(2).normal(size=(weights.shape[1], 3)).astype(np.float32)
    return lambda images: jnp.tanh(images.reshape(len(images), -1) @ weights) @ head


def _compare(student, teacher, images, *options):
    return attribution.Explanation(teacher, images, *options).similarity(student)


CLASSES = np.array([3, 0, 2, 2, 1])


def test_linear_model_in_closed_form():
    images, weights = _images(), _weights()
    own = weights[:, CLASSES].T.reshape(5, *SHAPE)
    value = gradient_times_input(_linear(weights), images, CLASSES)
    np.testing.assert_allclose(value, images * own, rtol=1e-5)
    for steps in (1, 7):
        value = integrated_gradients(_linear(weights), images, CLASSES, steps=steps)
        np.testing.assert_allclose(value, images * own, rtol=1e-5)
    baseline = _images(1, seed=9)[0]
    value = integrated_gradients(_linear(weights), images, CLASSES, baseline)
    np.testing.assert_allclose(value, (images - baseline) * own, rtol=1e-4, atol=1e-6)


def test_quadratic_model_tells_the_two_apart():
    # z_c = c Σ x²: the gradient at x is 2 c x, and its mean on the path from b is c (x + b).
    def fn(images):
        return jnp.arange(4.0) * jnp.sum(images**2, axis=(1, 2, 3))[:, None]

    images, scale = _images(), CLASSES[:, None, None, None]
    value = gradient_times_input(fn, images, CLASSES)
    np.testing.assert_allclose(value, 2 * scale * images**2, rtol=1e-5)
    value = integrated_gradients(fn, images, CLASSES, baseline=0.25, steps=3)
    np.testing.assert_allclose(value, scale * (images**2 - 0.25**2), rtol=1e-4, atol=1e-5)


def test_midpoint_rule_of_one_and_two_steps():
    # z = x³ from 0 to x: 3 x³ times the mean of the squared fractions.
    def fn(images):
        return images.reshape(len(images), -1)[:, :1] ** 3

    images = np.full((1, 1, 1, 1), 2.0, np.float32)
    one = integrated_gradients(fn, images, np.array([0]), steps=1)
    np.testing.assert_allclose(np.ravel(one), [24 * 0.5**2], rtol=1e-6)
    two = integrated_gradients(fn, images, np.array([0]), steps=2)
    np.testing.assert_allclose(np.ravel(two), [24 * (0.25**2 + 0.75**2) / 2], rtol=1e-6)


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_integrated_gradients_are_complete(baseline):
    fn, images, classes = _smooth(_weights(8)), _images(), np.array([0, 1, 2, 0, 1])
    value = integrated_gradients(fn, images, classes, baseline, steps=128)
    rows = np.arange(5)
    ends = [np.asarray(fn(v))[rows, classes] for v in (images, np.full_like(images, baseline))]
    np.testing.assert_allclose(np.sum(value, axis=(1, 2, 3)), ends[0] - ends[1], atol=2e-3)
    # Gradient times input is not: the model is no linear one.
    other = np.sum(gradient_times_input(fn, images, classes), axis=(1, 2, 3))
    assert np.abs(other - (ends[0] - ends[1])).max() > 0.1


def test_explains_the_logit_of_the_given_class_and_may_be_jitted():
    images, weights = _images(), _weights()
    jitted = jax.jit(lambda x, c: gradient_times_input(_linear(weights), x, c))
    for classes in (CLASSES, (CLASSES + 1) % 4):
        own = weights[:, classes].T.reshape(5, *SHAPE)
        np.testing.assert_allclose(jitted(images, classes), images * own, rtol=1e-5)


def test_similarity_is_scipys():
    a, b = _images(6, seed=3), _images(6, seed=4)
    b += 0.8 * a
    a[0].flat[:5] = 0  # ties, as of pixels without any attribution
    cosine, correlation = attribution.similarity(a, b)
    assert cosine.dtype == correlation.dtype == np.float64
    for i in range(6):
        assert cosine[i] == pytest.approx(1 - cosine_distance(a[i].ravel(), b[i].ravel()))
        assert correlation[i] == pytest.approx(spearmanr(a[i].ravel(), b[i].ravel()).statistic)


def test_similarity_at_its_ends():
    a = _images(2, seed=3)
    cosine, correlation = attribution.similarity(a, -2 * a)
    np.testing.assert_allclose(cosine, [-1, -1])
    np.testing.assert_allclose(correlation, [-1, -1])
    cosine, correlation = attribution.similarity(a, a**3)  # monotone
    np.testing.assert_allclose(correlation, [1, 1])
    assert (cosine < 0.99).all()


def test_undefined_similarities_are_nan():
    a = _images(3, seed=3)
    b = a.copy()
    b[0], b[1], b[2, 0, 0, 0] = 0, 1, np.nan
    cosine, correlation = attribution.similarity(a, b)
    assert np.isnan(cosine).tolist() == [True, False, True]
    assert np.isnan(correlation).tolist() == [True, True, True]


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_an_explanation_explains_the_teachers_prediction(batch_size):
    images, student, teacher = _images(), _weights(seed=5), _weights(seed=6)
    predicted = (images.reshape(5, -1).astype(np.float64) @ teacher + 0.5).argmax(-1)
    assert (predicted != (images.reshape(5, -1) @ student + 0.5).argmax(-1)).any()
    rows = images.reshape(5, -1).astype(np.float64)
    maps = [(rows * w[:, predicted].T) for w in (student, teacher)]
    shapes = []

    def counted(images):
        shapes.append(images.shape)
        return _linear(teacher)(images)

    result = _compare(_linear(student), counted, images, gradient_times_input, batch_size)
    pairs = list(zip(*maps, strict=True))
    assert result == pytest.approx(
        {
            "cosine": np.mean([1 - cosine_distance(a, b) for a, b in pairs]),
            "rank_correlation": np.mean([spearmanr(a, b).statistic for a, b in pairs]),
            "undefined": 0,
        },
        abs=1e-6,
    )
    assert len(set(shapes)) == 1  # the last, smaller batch compiles nothing


def test_an_explanation_takes_the_method_it_is_given():
    fns = _smooth(_weights(8)), _smooth(_weights(8, seed=7))
    images = _images()
    classes = np.asarray(fns[1](images)).argmax(-1)
    method = functools.partial(integrated_gradients, baseline=0.7, steps=4)
    maps = [method(fn, images, classes) for fn in fns]
    expected = [np.mean(v) for v in attribution.similarity(*maps)]
    result = _compare(*fns, images, method)
    assert [result["cosine"], result["rank_correlation"]] == pytest.approx(expected, abs=1e-5)
    default = _compare(*fns, images)
    assert default["cosine"] != pytest.approx(result["cosine"], abs=1e-3)


def test_undefined_examples_are_left_out_and_counted():
    images, weights = _images(), _weights()
    images[:2] = 0
    fn = _linear(weights)
    result = _compare(fn, fn, images, gradient_times_input)
    assert result == pytest.approx({"cosine": 1, "rank_correlation": 1, "undefined": 0.4})
    result = _compare(fn, fn, images[:2], gradient_times_input)
    assert math.isnan(result["cosine"])
    assert result["undefined"] == 1


def _affine(weights, offset, images):
    return images.reshape(len(images), -1) @ weights + offset


def test_a_callable_with_weights_as_leaves_is_compiled_once_for_all_weights():
    traced = []

    def counted(weights, offset, images):
        traced.append(1)
        return _affine(weights, offset, images)

    images, weights = _images(), [_weights(seed=seed) for seed in (5, 6, 7)]
    students = [jax.tree_util.Partial(counted, w, 0.5) for w in weights[:2]]
    explained = attribution.Explanation(_linear(weights[2]), images, gradient_times_input)
    found, traces = [], []
    for student in students:
        found.append(explained.similarity(student))
        traces.append(len(traced))
    assert traces[0] == traces[1] > 0
    for w, value in zip(weights, found, strict=False):
        plain = _compare(_linear(w), _linear(weights[2]), images, gradient_times_input)
        assert value == pytest.approx(plain, abs=1e-6)
    assert found[0]["cosine"] != pytest.approx(found[1]["cosine"], abs=1e-3)


@pytest.mark.slow
def test_no_cache_keeps_a_plain_function():
    fn, images = _linear(_weights()), _images()
    _compare(fn, _linear(_weights(seed=5)), images)
    dropped = weakref.ref(fn)
    del fn
    gc.collect()
    assert dropped() is None


def test_what_cannot_be_explained_is_refused():
    images, fn = _images(), _linear(_weights())
    for method in (gradient_times_input, integrated_gradients):
        with pytest.raises(ValueError, match=r"in \[0, 4\), given 0 to 4"):
            method(fn, images, np.array([0, 1, 2, 3, 4]))
        with pytest.raises(ValueError, match=r"given \(5, 4\) and \(1,\)"):
            method(fn, images, np.array([0]))
        with pytest.raises(ValueError, match="must be floats"):
            method(fn, images.astype(np.int32), CLASSES)
    with pytest.raises(ValueError, match="steps must be at least 1, given 0"):
        integrated_gradients(fn, images, CLASSES, steps=0)
    with pytest.raises(ValueError, match=r"baseline \(5,\) for images"):
        integrated_gradients(fn, images, CLASSES, np.zeros(5))
    with pytest.raises(ValueError, match="must have one shape"):
        attribution.similarity(images, images[:1])
    with pytest.raises(ValueError, match=r"have shapes \[\(5, 3\), \(5, 4\)\]"):
        _compare(_linear(_weights(3)), fn, images)
