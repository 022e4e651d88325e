"""What is captured of a model, by the path of the layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import models, quantize
from kdq.distill import capture

IMAGES = jax.random.normal(jax.random.key(0), (2, 6, 6, 1))


@pytest.fixture(scope="module")
def cnn():
    model = models.build("cnn", num_classes=3, widths=(3, 4), strides=(1, 1), batch_norm=True)
    return model, jax.jit(model.init)(jax.random.key(1), IMAGES)


def _convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_features_are_the_layers_outputs(cnn):
    model, variables = cnn
    layers = ("conv_0", "norm_0", "conv_1")
    outputs, state = capture.run(model, variables, {}, IMAGES, layers)
    assert set(outputs.features) == set(layers)
    assert state == {}
    params = variables["params"]
    first = _convolve(IMAGES, params["conv_0"]["kernel"])
    np.testing.assert_allclose(outputs.features["conv_0"], first, rtol=1e-4, atol=1e-5)
    normed = first / np.sqrt(1 + 1e-5)  # fresh statistics: mean 0, variance 1
    np.testing.assert_allclose(outputs.features["norm_0"], normed, rtol=1e-4, atol=1e-5)
    second = _convolve(jax.nn.relu(normed), params["conv_1"]["kernel"])
    np.testing.assert_allclose(outputs.features["conv_1"], second, rtol=1e-4, atol=1e-5)
    expected = model.apply(variables, IMAGES, train=False)
    np.testing.assert_array_equal(outputs.logits, expected)


def test_a_quantized_model_is_captured_as_it_computes(cnn):
    model, variables = cnn
    rules = quantize.uniform_rules(2, None)
    qparams = quantize.calibrate(model, variables, rules, [IMAGES])
    outputs, _ = capture.run(model, variables, qparams, IMAGES, ("conv_0",))
    kernel = quantize.fake_quantize(
        variables["params"]["conv_0"]["kernel"], qparams["conv_0"]["weights"]
    )
    expected = _convolve(IMAGES, kernel)
    np.testing.assert_allclose(outputs.features["conv_0"], expected, rtol=1e-4, atol=1e-5)


def test_statistics_come_back_and_without_layers_there_are_no_features(cnn):
    model, variables = cnn
    outputs, state = capture.run(model, variables, {}, IMAGES, train=True, mutable=["batch_stats"])
    assert outputs.features == {}
    assert set(state) == {"batch_stats"}
    mean = np.asarray(_convolve(IMAGES, variables["params"]["conv_0"]["kernel"]).mean((0, 1, 2)))
    moved = np.asarray(state["batch_stats"]["norm_0"]["mean"])
    np.testing.assert_allclose(moved, 0.1 * mean, rtol=1e-3, atol=1e-6)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        twice = nn.Dense(4, name="twice")
        once = nn.Dense(3, name="once")
        return once(twice(twice(x)))


def test_a_shared_module_is_named_and_not_listed():
    model, x = Shared(), jnp.ones((2, 4))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert list(capture.list_outputs(model, variables, x)) == ["once"]
    with pytest.raises(ValueError, match="'twice' was called 2 times"):
        capture.run(model, variables, {}, x, ("twice",))
    with pytest.raises(ValueError, match="'thrice' was called 0 times"):
        capture.run(model, variables, {}, x, ("thrice",))


def test_what_is_listed_can_be_captured_and_has_that_shape(cnn):
    model, variables = cnn
    shapes = capture.list_outputs(model, variables, IMAGES)
    assert sorted(shapes) == ["conv_0", "conv_1", "head", "norm_0", "norm_1"]
    outputs, _ = capture.run(model, variables, {}, IMAGES, shapes)
    assert {k: v.shape for k, v in outputs.features.items()} == {
        k: v.shape for k, v in shapes.items()
    }
