"""LiteRT files in LiteRT against the integer models that they are of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import lowered, network

from kdq import deploy, quantize
from kdq.deploy.formats import litert
from kdq.quantize.network import Weights

pytest.importorskip("litert_converter")
interpreter = pytest.importorskip("ai_edge_litert.interpreter")


DEFAULT = [("mlp", (2, 8))]
CASES = [
    pytest.param(name, bits, marks=() if (name, bits) in DEFAULT else pytest.mark.slow)
    for name in ("mlp", "pooled", "resnet", "vit")
    for bits in [(8, 8), (4, 4), (2, 8)]
]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_does_as_the_integer_model(name, bits):
    model, variables, images = network(name, offsets=0.5)
    qparams = quantize.calibrate(model, variables, quantize.uniform_rules(*bits), [images])
    integer = deploy.lower(model, Weights(variables=variables, qparams=qparams), images)
    data = litert.to_litert(integer, images)
    outputs = litert.load_litert(data)(np.asarray(images))
    expected = np.asarray(integer(images))
    # Multipliers are fixed-point numbers there: some codes are the next one.
    assert np.abs(outputs - expected).max() < 0.05 * np.abs(expected).max()
    assert np.isclose(outputs, expected, atol=1e-5).mean() > 0.3
    assert (outputs.argmax(-1) == expected.argmax(-1)).mean() > 0.95
    # Every layer is an integer operator: of floats there are inputs, outputs and what is between.
    weights = [
        d for d in interpreter.Interpreter(model_content=data).get_tensor_details()
        if d["quantization_parameters"]["scales"].size and d["dtype"] == np.int8
    ]  # fmt: skip
    assert len(weights) >= len(qparams)


def test_weights_that_it_has_no_type_for_are_an_error():
    model, variables, images = network("mlp")
    spec = quantize.TensorSpec(bits=8, symmetric=False)
    rules = (
        quantize.QuantizationRule(path=".*", weights=spec, activations=quantize.TensorSpec(bits=8)),
    )
    integer, _ = lowered(model, variables, images, rules)
    with pytest.raises(ValueError, match="around 0"):
        litert.to_litert(integer, images)


class Branches(nn.Module):
    """What a layer makes goes on to a mean, a maximum and a concatenation, each to its own grid."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(6, (3, 3))(x)
        pooled = nn.Conv(4, (1, 1))(nn.avg_pool(nn.relu(x), (2, 2), (2, 2)))
        joined = jnp.concatenate([x, 3 * nn.Conv(4, (1, 1))(x)], -1)
        wide = nn.Conv(4, (1, 1))(nn.max_pool(nn.softplus(joined), (2, 2), (2, 2)))
        return nn.Dense(5)((pooled + wide).mean((1, 2)))


def test_roundings_stay_where_they_are():
    """The converter moved them back to what a layer makes, by a part of ten of the outputs."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(16, 8, 8, 3)), jnp.float32)
    model = Branches()
    variables = jax.jit(model.init)(jax.random.key(0), images)
    qparams = quantize.calibrate(model, variables, quantize.uniform_rules(8, 8), [images])
    integer = deploy.lower(model, Weights(variables=variables, qparams=qparams), images)
    variables = integer.simulated(variables)
    simulated = np.asarray(quantize.predict(model, variables, qparams, images))
    outputs = litert.load_litert(litert.to_litert(integer, images))(np.asarray(images))
    assert np.abs(outputs - simulated).max() < 2e-3 * np.abs(simulated).max()


def _runs(model, x):
    """The largest difference of a float model in LiteRT."""
    variables = jax.jit(model.init)(jax.random.key(0), x)
    expected = np.asarray(model.apply(variables, x))
    integer = deploy.lower(model, Weights(variables=variables, qparams={}), x)
    outputs = litert.load_litert(litert.to_litert(integer, x))(np.asarray(x))
    assert outputs.shape == expected.shape
    return np.abs(outputs - expected).max()


@pytest.mark.parametrize(
    ("size", "strides", "padding"),
    [
        (3, 2, "SAME"),
        pytest.param(4, 3, "SAME", marks=pytest.mark.slow),
        pytest.param(5, 2, "VALID", marks=pytest.mark.slow),
        pytest.param(2, 3, ((0, 2), (1, 0)), marks=pytest.mark.slow),
    ],
)
def test_transposed_convolutions(size, strides, padding):
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    model = nn.ConvTranspose(3, (size, size), strides=(strides, strides), padding=padding)
    assert _runs(model, x) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), pytest.param((3, 1), marks=pytest.mark.slow)])
def test_matrices_times_axes_of_one_element(shape):
    """As in squeeze-excite."""
    x = np.random.default_rng(0).normal(size=(2, *shape, 4)).astype(np.float32)
    assert _runs(nn.Dense(5), x) < 1e-5


def test_an_operation_that_it_lacks_is_an_error_of_one_line():
    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sort(nn.Dense(5)(x), axis=-1)

    with pytest.raises(ValueError, match=r"^its runtime: it has no operator STABLEHLO_SORT$"):
        _runs(Sorted(), np.ones((2, 4), np.float32))
