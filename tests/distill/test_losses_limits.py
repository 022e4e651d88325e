"""What single losses on logits become in special cases, in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logit_oracles import logits, probabilities
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from kdq.distill import losses
from kdq.distill.reduction import hide, reduce

LABELS = np.array([3, 0, 9, 3, 5, 1])


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(loss, student, *rest):
    value, pull = jax.vjp(lambda s: loss(s, *rest), student)
    return value, pull(jnp.ones(value.shape))[0]


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1))
def _slopes(beta, alpha, student, teacher):
    value = losses.jensen_shannon(student, teacher, 4.0, beta)
    return jnp.sum(value + losses.skew_kl(student, teacher, 4.0, alpha))


@pytest.mark.parametrize(("beta", "limit"), [(0.0, losses.kl), (1.0, losses.reverse_kl)])
def test_jensen_shannon_ends_in_the_two_divergences(beta, limit):
    student, teacher = logits()
    expected, slope = _value_and_gradient(limit, student, teacher, 4.0)
    value, gradient = _value_and_gradient(losses.jensen_shannon, student, teacher, 4.0, beta)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    # Close to the end it is the same divergence times the weight that vanishes.
    near = abs(beta - 1e-4)
    value, gradient = _value_and_gradient(losses.jensen_shannon, student, teacher, 4.0, near)
    np.testing.assert_allclose(value / 1e-4, expected, rtol=5e-3)
    np.testing.assert_allclose(gradient / 1e-4, slope, atol=0.02)


def test_skew_divergence_begins_in_kl_and_ends_at_zero():
    student, teacher = logits()
    expected = _value_and_gradient(losses.kl, student, teacher, 4.0)
    for value, kl in zip(
        _value_and_gradient(losses.skew_kl, student, teacher, 4.0, 0.0), expected, strict=True
    ):
        np.testing.assert_allclose(value, kl, rtol=1e-6, atol=1e-7)
    for value in _value_and_gradient(losses.skew_kl, student, teacher, 4.0, 1.0):
        np.testing.assert_array_equal(value, np.zeros(value.shape))


def test_the_weight_of_a_mixture_has_no_infinite_derivative():
    assert _slopes(0.0, 1.0, *logits()) == (0, 0)
    assert _slopes(1.0, 0.0, *logits()) == (0, 0)


def test_mixtures_are_bounded_where_kl_is_not():
    student, teacher = np.float32([[1e4, -1e4]]), np.float32([[-1e4, 1e4]])  # they share no class
    value = losses.skew_kl(student, teacher, 2.0, 0.1)
    np.testing.assert_allclose(value, 4 * np.log(10), rtol=1e-6)
    value = losses.jensen_shannon(student, teacher, 2.0, 0.5)
    np.testing.assert_allclose(value, 4 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("weight", [-0.1, 1.5])
@pytest.mark.parametrize("loss", [losses.jensen_shannon, losses.skew_kl])
def test_a_weight_outside_0_to_1_is_not_clipped(loss, weight):
    assert np.isnan(_value_and_gradient(loss, *logits(), 4.0, weight)[0]).all()


def test_dkd_splits_kl_into_the_label_and_the_rest():
    student, teacher = logits()
    label, rest = (
        _value_and_gradient(losses.dkd, student, teacher, LABELS, 4.0, *weights)[0]
        for weights in ((1.0, 0.0), (0.0, 1.0))
    )
    q, p = probabilities(student, teacher, 4.0)
    other = 1 - p[np.arange(6), LABELS]
    np.testing.assert_allclose(label + other * rest, 16 * entropy(p, q, axis=-1), rtol=1e-5)


def test_dkd_needs_a_class_beside_the_label():
    with pytest.raises(ValueError, match="at least 2 classes"):
        losses.dkd(jnp.zeros((6, 1)), jnp.zeros((6, 1)), jnp.zeros(6, int))


def test_dist_has_no_correlation_with_what_is_constant():
    _, teacher = logits()
    # The softmax of equal logits can differ by rounding, which must not count as a signal.
    for level in (0.0, 0.1, 1e4):
        flat = np.full((6, 10), level, np.float32)
        value, gradient = _value_and_gradient(losses.dist, flat, teacher, 4.0, 2.0, 5.0)
        np.testing.assert_allclose(value, np.full(6, 16 * (2 + 5)), rtol=1e-6)
        np.testing.assert_array_equal(gradient, np.zeros((6, 10)))
    value, _ = _value_and_gradient(losses.dist, teacher, teacher, 4.0, 2.0, 5.0)
    np.testing.assert_allclose(value, np.zeros(6), atol=1e-4)


def test_dist_of_classes_that_hardly_occur_has_a_finite_gradient():
    student, teacher = logits()
    rare = np.float32([0, 0, 0, -19, -25, -40, -60, -80, -90, -300])  # p from 1e-9 to 0
    value, gradient = _value_and_gradient(
        losses.dist, student + rare, teacher + rare, 1.0, 1.0, 1.0
    )
    assert np.isfinite(value).all()
    assert 0.01 < np.abs(gradient).max() < 10


def test_standardized_logits_have_no_scale():
    student, teacher = logits()
    value, _ = _value_and_gradient(losses.standardized_kl, student, teacher, 2.0)
    scaled, _ = _value_and_gradient(losses.standardized_kl, 7 * student, teacher, 2.0)
    np.testing.assert_allclose(scaled, value, rtol=1e-5)
    flat = np.full((6, 10), 0.1, np.float32)
    value, gradient = _value_and_gradient(losses.standardized_kl, flat, teacher, 2.0)
    z = teacher.astype(np.float64)
    p = softmax((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True) / 2, axis=-1)
    np.testing.assert_allclose(value, 4 * entropy(p, np.full((6, 10), 0.1), axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(gradient, np.zeros((6, 10)))


def test_hard_label_takes_the_first_of_equal_logits():
    value = losses.hard_label(np.float32([[1, 2, 4]]), np.float32([[0, 5, 5]]))
    np.testing.assert_allclose(value, [-log_softmax([1.0, 2.0, 4.0])[1]], rtol=1e-6)


def test_a_label_that_is_no_class_shows():
    student, teacher = logits()
    labels = np.array([0, -1, 10, 9, 3, 3])
    task, _ = _value_and_gradient(losses.cross_entropy, student, labels, 0.0)
    dkd, _ = _value_and_gradient(losses.dkd, student, teacher, labels, 4.0, 1.0, 1.0)
    for value in (task, dkd):
        np.testing.assert_array_equal(np.isnan(value), [False, True, True, False, False, False])


def test_reduce_and_hide_by_hand():
    values, mask = jnp.array([1.0, np.nan, 4.0, np.inf]), jnp.array([True, False, True, False])
    np.testing.assert_array_equal(reduce(values, mask, "none"), [1, 0, 4, 0])
    assert reduce(values, mask, "sum") == 5
    assert reduce(values, mask.astype(jnp.bfloat16), "mean") == 2.5
    assert reduce(jnp.array([1.0, 4.0]), None, "mean") == 2.5
    assert reduce(values, jnp.zeros(4), "mean") == 0
    # Counted in the dtype of the mask, 999 ones in bfloat16 would be 1000.
    assert reduce(jnp.ones(999), jnp.ones(999, jnp.bfloat16), "mean") == 1
    features = jnp.full((4, 2, 3), jnp.nan)
    np.testing.assert_array_equal(hide(features, jnp.zeros(4)), np.zeros((4, 2, 3)))
    assert hide(features, None) is features
