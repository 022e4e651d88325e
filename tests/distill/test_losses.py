"""The distillation loss against scipy in float64 and its gradient in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from kdq.distill import losses

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


def _logits(shape=(6, 10), spread=3.0):
    rng = np.random.default_rng(0)
    return [(spread * rng.normal(size=shape)).astype(np.float32) for _ in range(2)]


def _probabilities(student, teacher, temperature):
    scaled = (np.asarray(v, np.float64) / temperature for v in (student, teacher))
    return [softmax(v, axis=-1) for v in scaled]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(6, 10), (10,), (2, 3, 4)])
def test_value_is_t_squared_times_scipys_relative_entropy(shape, temperature):
    student, teacher = _logits(shape)
    q, p = _probabilities(student, teacher, temperature)
    expected = temperature**2 * entropy(p, q, axis=-1)
    value = losses.kl(jnp.asarray(student), jnp.asarray(teacher), temperature)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    # It is no symmetric distance: the teacher's distribution comes first.
    assert not np.allclose(expected, temperature**2 * entropy(q, p, axis=-1), rtol=1e-2)


def test_temperature_is_1_unless_given_and_may_be_traced():
    student, teacher = map(jnp.asarray, _logits())
    np.testing.assert_array_equal(losses.kl(student, teacher), losses.kl(student, teacher, 1.0))
    traced = jax.jit(losses.kl)(student, teacher, jnp.float32(4))
    np.testing.assert_allclose(traced, losses.kl(student, teacher, 4.0), rtol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_is_t_times_the_difference_of_probabilities(temperature):
    student, teacher = _logits()
    q, p = _probabilities(student, teacher, temperature)
    weights = np.arange(1.0, 7.0)

    def loss(student, teacher):
        return jnp.sum(weights * losses.kl(student, teacher, temperature))

    to_student, to_teacher = jax.grad(loss, argnums=(0, 1))(student, teacher)
    expected = weights[:, None] * temperature * (q - p)
    np.testing.assert_allclose(to_student, expected, atol=1e-5 * temperature)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_array_equal(to_teacher, np.zeros((6, 10)))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_extreme_logits_are_exact_and_their_gradients_finite(temperature):
    student = jnp.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    teacher = jnp.array([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [1e4, 1e4, 1e4]])
    # The teacher is certain of class 1, to which the student gives log-probability -2e4 / T.
    value, pull = jax.vjp(lambda s: losses.kl(s, teacher, temperature), student)
    np.testing.assert_allclose(value, [2e4 * temperature, 0, 0], rtol=1e-6)
    certain = [[temperature, -temperature, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(pull(jnp.ones(3))[0], certain, atol=1e-6)


def test_zero_if_and_only_if_the_distributions_are_equal():
    student, teacher = map(jnp.asarray, _logits())
    np.testing.assert_array_equal(losses.kl(teacher, teacher, 4.0), np.zeros(6))
    shifted = teacher + jnp.arange(6.0)[:, None]  # the same distribution
    np.testing.assert_allclose(losses.kl(shifted, teacher, 4.0), np.zeros(6), atol=1e-5)
    assert (losses.kl(student, teacher, 4.0) > 0.1).all()
    nudged = teacher.at[:, 0].add(0.1)
    assert (losses.kl(nudged, teacher, 1.0) > 1e-6).all()


def test_bfloat16_logits_are_compared_in_float32():
    student, teacher = (v.astype(jnp.bfloat16) for v in _logits())
    q, p = _probabilities(student.astype(np.float64), teacher.astype(np.float64), 4.0)
    value, pull = jax.vjp(lambda s: losses.kl(s, jnp.asarray(teacher), 4.0), jnp.asarray(student))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 16 * entropy(p, q, axis=-1), rtol=2e-5)
    (gradient,) = pull(jnp.ones(6))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(gradient, np.float64), 4 * (q - p), rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("shapes", [((6, 10), (6, 9)), ((6, 10), (1, 10)), ((10,), (6, 10))])
def test_shapes_are_never_broadcast(shapes):
    student, teacher = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match="must have one shape") as error:
        losses.kl(student, teacher)
    assert str(shapes[0]) in str(error.value)
    assert str(shapes[1]) in str(error.value)
