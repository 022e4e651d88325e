"""Other forms of a convolution against XLA's own, in values and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.train.convolution import MOST_BYTES, fast_convolutions

# {name: (channels, features, arguments of nn.Conv, how many of a convolution, the gradient of its
# images and that of its kernel stay XLA's)}
CASES = {
    "pointwise": (4, 6, {"kernel_size": (1, 1)}, 0),
    "pointwise_strided": (4, 6, {"kernel_size": (1, 1), "strides": 2}, 0),
    "pointwise_strided_unevenly": (4, 6, {"kernel_size": (1, 1), "strides": (2, 3)}, 0),
    "pointwise_valid": (4, 6, {"kernel_size": (1, 1), "padding": "VALID", "use_bias": False}, 0),
    "pointwise_padded": (4, 6, {"kernel_size": (1, 1), "padding": ((1, 1), (0, 2))}, 0),
    "pointwise_circular": (4, 6, {"kernel_size": (1, 1), "padding": "CIRCULAR"}, 0),
    "pixels": (1, 8, {"kernel_size": (3, 3)}, 1),
    "pixels_strided": (3, 8, {"kernel_size": (5, 5), "strides": 2}, 2),
    "few": (8, 8, {"kernel_size": (3, 3)}, 3),
    "few_strided": (8, 8, {"kernel_size": (3, 3), "strides": 2}, 3),
    "some_strided": (16, 16, {"kernel_size": (3, 3), "strides": 2}, 1),
    "many": (32, 32, {"kernel_size": (3, 3)}, 2),
    "more": (64, 64, {"kernel_size": (2, 3)}, 1),
    "many_strided": (32, 32, {"kernel_size": (3, 3), "strides": 2, "padding": "SAME"}, 1),
    "growing": (32, 64, {"kernel_size": (3, 3)}, 0),
    "uneven": (32, 64, {"kernel_size": (2, 4), "strides": (2, 3), "padding": "VALID"}, 0),
    "padded": (32, 64, {"kernel_size": (3, 2), "padding": ((2, 0), (1, 3))}, 0),
    "cut": (32, 64, {"kernel_size": (3, 3), "padding": ((-1, 1), (0, -1))}, 3),
    "dilated": (32, 64, {"kernel_size": (3, 3), "kernel_dilation": 2}, 3),
    "transposed": (
        *(32, 64),
        {"kernel_size": (3, 3), "input_dilation": 2, "padding": ((2, 1), (1, 2))},
        3,
    ),
    "grouped": (32, 64, {"kernel_size": (3, 3), "feature_group_count": 2}, 3),
}
DEFAULT = [("pixels", 7), ("many_strided", 8)]
EVERY = [
    pytest.param(case, size, marks=() if (case, size) in DEFAULT else pytest.mark.slow)
    for case in CASES
    for size in (7, 8)
]


def layer_of(case, size):
    channels, features, options, _ = CASES[case]
    images = np.random.default_rng(0).normal(size=(3, size, size, channels))
    layer = nn.Conv(features, **options)
    images = jnp.asarray(images, jnp.float32)
    return layer, jax.jit(layer.init)(jax.random.key(0), images), images


def gradients(layer, params, images):
    value = lambda params, images: jnp.sum(jnp.sin(layer.apply(params, images)))
    return jax.value_and_grad(value, (0, 1))(params, images)


def count_convolutions(layer, params, images):
    program = jax.jit(lambda *given: gradients(layer, *given)).lower(params, images).as_text()
    return program.count("stablehlo.convolution")


@pytest.mark.parametrize(("case", "size"), EVERY)
def test_the_same_values_and_gradients(case, size):
    layer, params, images = layer_of(case, size)
    plain = gradients(layer, params, images)
    with fast_convolutions():
        ours = gradients(layer, params, images)
        count = count_convolutions(layer, params, images)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
    assert count == CASES[case][-1]
    assert count_convolutions(layer, params, images) == 3


@pytest.mark.parametrize("dims", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_other_numbers_of_dimensions(dims):
    images = np.random.default_rng(0).normal(size=(2, *[5] * dims, 32)).astype(np.float32)
    layer = nn.Conv(32, [3] * dims, strides=2)
    params = jax.jit(layer.init)(jax.random.key(0), images)
    plain = gradients(layer, params, images)
    with fast_convolutions():
        ours = gradients(layer, params, images)
        assert count_convolutions(layer, params, images) == 1
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_not_differentiated_stays_as_it_is():
    layer, params, images = layer_of("growing", 8)
    with fast_convolutions():
        ours = jax.jit(layer.apply)(params, images)
        program = jax.jit(layer.apply).lower(params, images).as_text()
    assert "stablehlo.convolution" in program
    assert "dot_general" not in program
    np.testing.assert_array_equal(ours, jax.jit(layer.apply)(params, images))


def test_a_convolution_of_the_users_own_is_left_alone():
    def own(images, *args, **kwargs):
        return jnp.zeros((*images.shape[:-1], 6))

    layer = nn.Conv(6, (1, 1), conv_general_dilated=own)
    images = jnp.ones((2, 4, 4, 3))
    params = jax.jit(layer.init)(jax.random.key(0), images)
    with fast_convolutions():
        assert not layer.apply(params, images).any()


def test_copies_that_would_fill_the_memory_are_not_made():
    layer = nn.Conv(64, (3, 3))
    pixels = 3 * 32 * 4 * 28 * 28  # bytes of an image's rows
    for examples, of_xla in ((MOST_BYTES // pixels, 2), (MOST_BYTES // pixels + 1, 3)):
        images = jax.ShapeDtypeStruct((examples, 28, 28, 32), jnp.float32)
        params = jax.eval_shape(layer.init, jax.random.key(0), images)
        with fast_convolutions():
            assert count_convolutions(layer, params, images) == of_xla
