"""Chunks of the relational losses, coinciding examples, and what the losses do not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_oracles import CASES, close, numerical_gradient, relational_angle, relational_distance

from kdq.distill import features

PAIRS = [
    (features.relational_distance, relational_distance),
    (features.relational_angle, relational_angle),
]


def _arrays(batch=7):
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(batch, d)).astype(np.float32) for d in (3, 4)]
    arrays[0][0] *= 6
    return arrays


@pytest.mark.parametrize(("loss", "oracle"), PAIRS)
@pytest.mark.parametrize("chunk", [3, 100])  # a rest of 1; more than there is
def test_chunks_change_nothing(loss, oracle, chunk):
    student, teacher = _arrays()
    mask = np.array([1, 1, 0, 1, 1, 1, 1], np.float32)
    weights = np.arange(1.0, 8.0)

    def run(chunk):
        def total(student):
            values = loss(student, teacher, chunk, mask=jnp.asarray(mask))
            return jnp.sum(weights * values), values

        return jax.jit(jax.value_and_grad(total, has_aux=True))(student)

    (_, values), gradient = run(chunk)
    kept = mask > 0
    doubles = [x[kept].astype(np.float64) for x in (student, teacher)]
    np.testing.assert_allclose(values[kept], oracle(*doubles), rtol=1e-5)
    expected = numerical_gradient(lambda x: weights[kept] @ oracle(x, doubles[1]), doubles[0])
    close(gradient[kept], expected)
    assert not gradient[2].any()


@pytest.mark.parametrize(("loss", "oracle"), PAIRS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_coinciding_examples_of_the_student(loss, oracle, chunk):
    student, teacher = _arrays()
    student[1] = student[4]
    doubles = [x.astype(np.float64) for x in (student, teacher)]

    @jax.jit
    def run(student):
        return jax.value_and_grad(lambda s: loss(s, teacher, chunk, reduction="sum"))(student)

    value, gradient = run(student)
    np.testing.assert_allclose(value, oracle(*doubles).sum(), rtol=1e-5)
    # At distance 0 the loss has a kink; elsewhere the gradient must be the oracle's.
    expected = numerical_gradient(lambda x: oracle(x, doubles[1]).sum(), doubles[0])
    assert np.isfinite(gradient).all()
    others = [0, 2, 3, 5, 6]
    close(gradient[np.array(others)], expected[others])


def test_both_parts_of_the_huber_loss_are_tested():
    student, teacher = _arrays()

    def normalized(x):
        d = np.linalg.norm(x[:, None] - x, axis=-1)
        return d / d[~np.eye(len(x), dtype=bool)].mean()

    difference = np.abs(normalized(student) - normalized(teacher))
    assert difference.max() > 1
    assert (difference < 1).mean() > 0.5


@pytest.mark.parametrize("loss", [pair[0] for pair in PAIRS])
def test_relations_do_not_depend_on_place_scale_or_direction(loss):
    student, _ = _arrays()
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    moved = (5 * student @ rotation + 2).astype(np.float32)
    loss = jax.jit(loss)
    np.testing.assert_allclose(loss(moved, student), np.zeros(7), atol=1e-9)
    student[0] += 1
    assert loss(moved, student).min() > 1e-6


def test_points_close_together_and_far_from_the_origin_keep_their_distances():
    offsets = np.array([[0, 0], [3, 4], [0, 8]], np.float32) / 64  # exact beside 1024
    teacher = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
    value = jax.jit(features.relational_distance)(offsets + 1024, teacher)
    np.testing.assert_allclose(value, relational_distance(offsets * 1.0, teacher * 1.0), rtol=1e-5)


@pytest.mark.parametrize("loss", [pair[0] for pair in PAIRS])
@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_of_nothing_are_refused(loss, chunk):
    with pytest.raises(ValueError, match=f"chunk must be at least 1, or None, given {chunk}"):
        loss(jnp.ones((4, 2)), jnp.ones((4, 2)), chunk)


def _gradient_memory(loss, batch, chunk):
    x = jax.ShapeDtypeStruct((batch, 8), jnp.float32)
    gradient = jax.jit(jax.grad(lambda s, t: loss(s, t, chunk, reduction="mean")))
    return gradient.lower(x, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "power"), [(features.relational_distance, 2), (features.relational_angle, 3)]
)
def test_memory_of_the_gradient_is_linear_in_the_batch_if_chunked(loss, power):
    small, large = (_gradient_memory(loss, batch, 4) for batch in (64, 256))
    assert large < 4.5 * small
    whole_small, whole_large = (_gradient_memory(loss, batch, None) for batch in (64, 256))
    assert whole_large > 0.6 * 4**power * whole_small
    assert whole_large > 20 * large


def test_similarities_do_not_depend_on_the_scale_of_either_feature():
    student, teacher = CASES["similarity_preserving"].arrays()
    loss = jax.jit(features.similarity_preserving)
    expected = loss(student, teacher)
    scaled = loss(np.float32(1e12) * student, np.float32(1e-12) * teacher)
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)
