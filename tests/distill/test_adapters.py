"""Adapters against plain products, and the shapes they refuse."""

import jax
import numpy as np
import pytest
from jax import lax

from kdq.distill import adapters

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def test_linear_is_a_dense_layer_over_the_last_axis():
    x = RNG.normal(size=(3, 5, 4)).astype(np.float32)
    params = adapters.init_linear(KEY, x.shape, (3, 5, 7))
    params["bias"] = np.arange(7.0)
    expected = np.einsum("bti,io->bto", x, np.asarray(params["kernel"], np.float64)) + np.arange(7)
    np.testing.assert_allclose(adapters.adapt(params, x, (3, 5, 7)), expected, rtol=1e-4, atol=1e-5)
    assert 0.1 < np.asarray(params["kernel"]).std() < 1  # drawn, not zero


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
def test_conv_is_a_strided_1x1_convolution(stride):
    x = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
    target = (2, 8 // stride[0], 8 // stride[1], 5)
    params = adapters.init_conv(KEY, x.shape, target)
    expected = lax.conv_general_dilated(
        x,
        params["kernel"][None, None],
        stride,
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert expected.shape == target
    np.testing.assert_allclose(adapters.adapt(params, x, target), expected, rtol=1e-4, atol=1e-5)


def test_none_is_the_identity_and_fit_follows_the_rank():
    x = RNG.normal(size=(2, 3)).astype(np.float32)
    assert adapters.KINDS["none"](KEY, (2, 3), (2, 3)) == {}
    assert adapters.adapt({}, x, (2, 3)) is x
    maps = adapters.init_fit(KEY, (2, 8, 8, 3), (2, 4, 4, 5))
    np.testing.assert_array_equal(
        maps["kernel"], adapters.init_conv(KEY, (2, 8, 8, 3), (2, 4, 4, 5))["kernel"]
    )
    assert adapters.init_fit(KEY, (2, 6), (2, 9))["kernel"].shape == (6, 9)


@pytest.mark.parametrize(
    "shapes", [((2, 8, 8, 3), (2, 3, 3, 5)), ((2, 4, 4, 3), (2, 8, 8, 5)), ((2, 3), (2, 5))]
)
def test_maps_that_no_stride_fits_are_refused(shapes):
    with pytest.raises(ValueError, match="divide theirs; given"):
        adapters.init_conv(KEY, *shapes)
