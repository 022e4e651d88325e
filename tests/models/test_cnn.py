"""The plain convolutional network: its pooling and its downsampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdq import models
from kdq.models.cnn import max_pool_2x2


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 7, 8, 3), (1, 5, 3, 2)])
def test_pairwise_maximum_is_max_pool_with_its_gradient(shape):
    x = jax.random.normal(jax.random.key(0), shape)

    def ours(x):
        return jnp.sum(jnp.sin(max_pool_2x2(x)))

    def theirs(x):
        return jnp.sum(jnp.sin(nn.max_pool(x, (2, 2), (2, 2))))

    np.testing.assert_array_equal(max_pool_2x2(x), nn.max_pool(x, (2, 2), (2, 2)))
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(theirs)(x), rtol=1e-6)


def test_global_pooling_makes_logits_independent_of_position():
    model = models.build("cnn", num_classes=4, widths=(6,), strides=(1,))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 12, 12, 2)))
    small = jax.random.normal(jax.random.key(1), (1, 4, 4, 2))
    # Surrounded by zeros a pattern may move without the mean of its features changing.
    first = jnp.pad(small, ((0, 0), (2, 6), (2, 6), (0, 0)))
    second = jnp.pad(small, ((0, 0), (5, 3), (4, 4), (0, 0)))
    logits = model.apply(variables, first, train=False)
    np.testing.assert_allclose(logits, model.apply(variables, second, train=False), atol=1e-6)
    assert not np.allclose(logits, model.apply(variables, 2 * first, train=False))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    ("strides", "sides"), [(None, [12, 6, 3]), ((1, 1, 2), [12, 12, 6]), ((2, 2, 1), [6, 3, 3])]
)
def test_strides_set_where_the_image_is_halved(pool, strides, sides):
    model = models.build("cnn", num_classes=4, strides=strides, pool=pool)

    def capture(image):
        variables = jax.jit(model.init)(jax.random.key(0), image)
        return model.apply(variables, image, capture_intermediates=True, mutable="intermediates")

    _, captured = jax.eval_shape(capture, jnp.zeros((1, 12, 12, 1)))
    inner = captured["intermediates"]
    seen = [inner[f"conv_{i}"]["__call__"][0].shape[1] for i in range(3)]
    # A pooled layer's own output is still as large as its input.
    assert seen == ([12, *sides[:-1]] if pool else sides)
