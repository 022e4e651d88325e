"""Number formats against ml_dtypes' own rounding, published levels, and block formats by hand."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kdq.quantize import FORMATS, QuantizationRule, TensorSpec, fake_quantize, grid
from kdq.quantize.calibrate import weight_quantizer
from kdq.quantize.layers import LayerInfo

RNG = np.random.default_rng(0)
TYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}


def _layer(shape):
    return LayerInfo(
        path="layer",
        kind="Dense",
        weight_name="kernel",
        weight_shape=shape,
        input_shape=(1, shape[0]),
        output_shape=(1, shape[1]),
        macs=0,
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "fp4_e2m1" else pytest.mark.slow) for n in TYPES]
)
def test_rounding_is_that_of_ml_dtypes(name):
    top = FORMATS[name].levels[-1]
    x = np.concatenate(
        [
            RNG.normal(size=2000) * top / 3,
            np.exp(RNG.normal(size=500) * 4) * np.sign(RNG.normal(size=500)),
            (np.array(FORMATS[name].levels)[1:] + np.array(FORMATS[name].levels)[:-1]) / 2,  # ties
        ]
    ).astype(np.float32)
    x = np.clip(x, -top, top)
    quantizer = grid.from_range(-top, top, 8, format=name)
    assert quantizer.scale == 1
    expected = x.astype(TYPES[name]).astype(np.float32)
    np.testing.assert_array_equal(fake_quantize(jnp.asarray(x), quantizer), expected)
    assert grid.bits(quantizer) == FORMATS[name].bits == (4 if "fp4" in name else 8)


def test_known_levels():
    assert FORMATS["fp4_e2m1"].levels[7:] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert (FORMATS["fp8_e4m3"].levels[-1], FORMATS["fp8_e5m2"].levels[-1]) == (448, 57344)
    # arXiv:2305.14314, appendix E.
    nf4 = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(FORMATS["nf4"].levels, nf4, atol=1e-6)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_microscaling_blocks_by_hand(name):
    """Blocks of 32 inputs share 2^(floor(log2 max) - floor(log2 of the largest level))."""
    weight = (RNG.normal(size=(64, 3)) * np.exp(RNG.normal(size=(1, 3)))).astype(np.float32)
    spec = TensorSpec(format=name)
    quantizer = weight_quantizer(jnp.asarray(weight), spec, _layer(weight.shape))
    assert quantizer.scale.shape == (2, 3)
    found = np.asarray(fake_quantize(jnp.asarray(weight), quantizer))
    kind = TYPES["fp4_e2m1" if name == "mxfp4" else name.replace("mx", "")]
    top = float(ml_dtypes.finfo(kind).max)
    for block in range(2):
        for channel in range(3):
            own = weight[32 * block : 32 * block + 32, channel].astype(np.float64)
            shared = 2.0 ** (np.floor(np.log2(np.abs(own).max())) - np.floor(np.log2(top)))
            expected = np.clip(own / shared, -top, top).astype(kind).astype(np.float64) * shared
            np.testing.assert_allclose(found[32 * block : 32 * block + 32, channel], expected)


def test_nvfp4_blocks_by_hand():
    """Blocks of 16 share an e4m3 number times a float32 of the tensor."""
    weight = RNG.normal(size=(32, 2)).astype(np.float32)
    quantizer = weight_quantizer(
        jnp.asarray(weight), TensorSpec(format="nvfp4"), _layer(weight.shape)
    )
    blocks = weight.reshape(2, 16, 2).astype(np.float64)
    raw = np.abs(blocks).max(1, keepdims=True) / 6
    tensor = raw.max() / 448
    scale = (raw / tensor).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * tensor
    units = np.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    found = np.asarray(fake_quantize(jnp.asarray(weight), quantizer))
    np.testing.assert_allclose(found, (units * scale).reshape(32, 2), rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_pass_inside_and_stop_outside(name):
    quantizer = grid.from_range(-1.0, 1.0, 8, format=name)
    x = jnp.array([-3.0, -0.4, 0.0, 0.3, 0.9, 2.0])
    value, pull = jax.vjp(lambda x: fake_quantize(x, quantizer), x)
    top = float(value[-1])
    expected = (np.abs(x) <= top).astype(np.float32)
    np.testing.assert_array_equal(pull(jnp.ones(6))[0], expected)
    assert list(expected) == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("name", FORMATS)
def test_all_zero_weights_stay_zero(name):
    weight = jnp.zeros((32, 2))
    quantizer = weight_quantizer(weight, TensorSpec(format=name), _layer((32, 2)))
    np.testing.assert_array_equal(fake_quantize(weight, quantizer), weight)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"bits=4, format='nf4': expected one or the other"):
        TensorSpec(bits=4, format="nf4")
    with pytest.raises(ValueError, match=r"format='fp7': expected one of"):
        TensorSpec(format="fp7")
    with pytest.raises(ValueError, match=r"has groups of 32: 16"):
        TensorSpec(format="mxfp4", granularity="per_group", group_size=16)
    with pytest.raises(ValueError, match=r"'layer': group_size=32 does not divide its 48 inputs"):
        weight_quantizer(jnp.zeros((48, 2)), TensorSpec(format="mxfp4"), _layer((48, 2)))
    with pytest.raises(ValueError, match="dynamic is for activations"):
        QuantizationRule(path=".*", weights=TensorSpec(bits=4, dynamic=True))
    with pytest.raises(ValueError, match="per_token' has no fixed scale"):
        TensorSpec(bits=4, granularity="per_token")
