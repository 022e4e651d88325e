"""Other forms of a convolution against XLA's own, in values and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.train.convolution import LEAST_CHANNELS, LEAST_FEATURES, fast_convolutions

CASES = {
    "pointwise": {"kernel_size": (1, 1)},
    "strided": {"kernel_size": (1, 1), "strides": 2},
    "strided_unevenly": {"kernel_size": (1, 1), "strides": (2, 3)},
    "line": {"kernel_size": (1, 1), "padding": "VALID", "use_bias": False},
    "padded": {"kernel_size": (1, 1), "padding": ((1, 1), (0, 2))},
    "circular": {"kernel_size": (1, 1), "padding": "CIRCULAR"},
    "dilated": {"kernel_size": (1, 1), "input_dilation": 2, "padding": ((0, 0), (0, 0))},
    "grouped": {"kernel_size": (1, 1), "feature_group_count": 2},
    "few_channels": {"kernel_size": (3, 3), "strides": 2},
    "window": {"kernel_size": (3, 3)},
    "window_strided": {"kernel_size": (3, 3), "strides": 2, "padding": "SAME"},
    "window_uneven": {"kernel_size": (2, 4), "strides": (2, 3), "padding": "VALID"},
    "window_padded": {"kernel_size": (3, 2), "padding": ((2, 0), (1, 3))},
    "window_dilated": {"kernel_size": (3, 3), "kernel_dilation": 2},
    "window_grouped": {"kernel_size": (3, 3), "feature_group_count": 2},
}
LEFT_ALONE = ("dilated", "grouped", "few_channels", "window_dilated", "window_grouped")


DEFAULT = [("window", 7), ("window_strided", 8), ("window_uneven", 7), ("grouped", 8)]
EVERY = [
    pytest.param(case, size, marks=() if (case, size) in DEFAULT else pytest.mark.slow)
    for case in CASES
    for size in (7, 8)
]


@pytest.mark.parametrize(("case", "size"), EVERY)
def test_the_same_values_and_gradients(case, size):
    wide = case.startswith("window")
    channels, features = (LEAST_CHANNELS, LEAST_FEATURES) if wide else (4, 6)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(3, size, size, channels)), jnp.float32)
    layer = nn.Conv(features, **CASES[case])
    params = layer.init(jax.random.key(0), images)

    def value(params, images):
        return jnp.sum(jnp.sin(layer.apply(params, images)))

    plain = jax.value_and_grad(value, (0, 1))(params, images)
    with fast_convolutions():
        ours = jax.value_and_grad(value, (0, 1))(params, images)
        program = str(jax.make_jaxpr(value)(params, images))
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    assert ("dot_general" in program) == (case not in LEFT_ALONE)
    assert ("conv_general_dilated" in program) == (case in LEFT_ALONE)


def test_a_convolution_of_the_users_own_is_left_alone():
    def own(images, *args, **kwargs):
        return jnp.zeros((*images.shape[:-1], 6))

    layer = nn.Conv(6, (1, 1), conv_general_dilated=own)
    images = jnp.ones((2, 4, 4, 3))
    params = layer.init(jax.random.key(0), images)
    with fast_convolutions():
        assert not layer.apply(params, images).any()


def test_nothing_stays_behind():
    layer = nn.Conv(6, (1, 1))
    images = jnp.ones((2, 4, 4, 3))
    params = layer.init(jax.random.key(0), images)
    with fast_convolutions():
        layer.apply(params, images)
    assert "conv_general_dilated" in str(jax.make_jaxpr(layer.apply)(params, images))


def test_patches_that_would_fill_the_memory_are_not_made():
    layer = nn.Conv(64, (3, 3))
    images = jax.ShapeDtypeStruct((256, 56, 56, 64), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), images)
    with fast_convolutions():
        assert "dot_general" not in str(jax.make_jaxpr(layer.apply)(params, images))
