"""Packed scales of block formats: a byte each, by hand; the same weights; what is refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kdq import quantize
from kdq.deploy import PackedFileError, load_packed, save_packed
from kdq.deploy.formats import container
from kdq.quantize import FORMATS, QuantizationRule, TensorSpec, grid
from kdq.quantize.network import Weights

SLOW = ("nvfp4", "mxfp8_e4m3", "mxfp8_e5m2")
INPUTS, OUTPUTS, LAYERS = 64, 6, 3


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(INPUTS, name="dense")(x)), None


class Model(nn.Module):
    """A stack of layers, and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        stack = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return nn.Dense(OUTPUTS, name="head")(stack(name="layers")(x, None)[0])


@pytest.fixture(scope="module")
def network():
    """Variables, with blocks of many sizes and one of zeros; inputs; the quantizers of a format."""
    rng = np.random.default_rng(0)

    def dense(*shape):
        sizes = np.exp(2 * rng.normal(size=(*shape[:-1], 1)) - 2)
        kernel, bias = sizes * rng.normal(size=shape), rng.normal(size=(*shape[:-2], shape[-1]))
        return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}

    params = {"layers": {"dense": dense(LAYERS, INPUTS, INPUTS)}, "head": dense(INPUTS, OUTPUTS)}
    params["head"]["kernel"][:32, 0] = 0
    variables = jax.device_put({"params": params})
    x = jax.device_put(rng.normal(size=(4, INPUTS)).astype(np.float32))

    @functools.cache
    def calibrated(name):
        rules = (QuantizationRule(path=".*", weights=TensorSpec(format=name)),)
        return quantize.calibrate(Model(), variables, rules, [x])

    return variables, x, calibrated


@pytest.fixture(params=["mxfp4", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def packed(request, network, tmp_path):
    """`(format, qparams, file)`."""
    qparams = network[2](request.param)
    file = tmp_path / "model.safetensors"
    save_packed(file, Weights(variables=network[0], qparams=qparams), model={"name": "mine"})
    return request.param, qparams, file


def test_bytes_by_hand_and_the_same_model(packed, network):
    name, qparams, file = packed
    variables, x, _ = network
    block, bits = FORMATS[name].group_size, FORMATS[name].bits
    shared = 4 if name == "nvfp4" else 0
    layers = LAYERS * (INPUTS * INPUTS * bits // 8 + INPUTS // block * INPUTS + shared)
    head = INPUTS * OUTPUTS * bits // 8 + INPUTS // block * OUTPUTS + shared
    biases = 4 * (LAYERS * INPUTS + OUTPUTS)
    stored = safetensors.numpy.load_file(file)
    assert sum(array.nbytes for array in stored.values()) == layers + head + biases
    summary = quantize.summary(Model(), variables, qparams, x)
    assert summary.bytes == layers + head + biases

    loaded = load_packed(file, Model())
    for path in ("layers/dense", "head"):
        at = lambda tree, path=path: quantize.layers.at_path(tree["params"], path)["kernel"]
        simulated = quantize.fake_quantize(at(variables), qparams[path]["weights"])
        np.testing.assert_array_equal(at(loaded.variables), simulated)
    # The same variables in the same program: whatever differs was lost in the file.
    rounded = {"params": quantize.simulate.quantize_params(variables["params"], qparams)}
    np.testing.assert_array_equal(loaded(x), quantize.predict(Model(), rounded, {}, x))
    floats = quantize.predict(Model(), variables, {}, x)
    assert np.abs(loaded(x) - floats).max() > 1e-3


def test_stored_bytes_are_exponents_or_small_floats_by_hand(packed, network):
    name, _, file = packed
    stored = safetensors.numpy.load_file(file)
    scale_format = FORMATS[name].scale_format
    found = stored[f"params/layers/dense/kernel:scale_{scale_format}"]
    kernel = np.asarray(network[0]["params"]["layers"]["dense"]["kernel"], np.float64)
    blocks = np.abs(kernel).reshape(LAYERS, -1, FORMATS[name].group_size, INPUTS).max(2)
    assert (found.dtype, found.shape) == (np.uint8, blocks.shape)
    top = FORMATS[name].levels[-1]
    if scale_format == "e8m0":
        expected = 127 + np.floor(np.log2(blocks)) - np.floor(np.log2(top))
        np.testing.assert_array_equal(found, expected)
        return
    shared = stored["params/layers/dense/kernel:scale_tensor"]
    np.testing.assert_allclose(shared, blocks.max((1, 2)) / top / 448, rtol=1e-6)
    expected = (blocks / top / shared[:, None, None]).astype(ml_dtypes.float8_e4m3fn)
    apart = found != expected.view(np.uint8)  # float64 may fall on the other side of a tie
    assert apart.mean() < 0.02
    assert found.max() == 0x7E  # 448


def _rewritten(file, change):
    document, arrays = container.read(file)
    arrays = {name: array.copy() for name, array in arrays.items()}
    change(arrays, document["layers"]["head"]["weight"])
    container.write(file, document, arrays)


def _set(arrays, suffix, change):
    (key,) = (name for name in arrays if name.startswith(f"params/head/kernel:{suffix}"))
    arrays[key] = change(arrays[key])


def _no_number(codes):
    codes[0, 0] = 0xFF  # NaN in both
    return codes


CHANGES = {
    "no number": lambda arrays, _: _set(arrays, "scale_e", _no_number),
    "not bytes": lambda arrays, _: _set(arrays, "scale_e", lambda a: a.astype(np.float32)),
    "shape": lambda arrays, _: _set(arrays, "scale_e", lambda a: a[:, :-1].copy()),
    "gone": lambda arrays, _: arrays.pop(next(k for k in arrays if "head/kernel:scale_e" in k)),
    "unknown": lambda _, info: info.update(scale_format="e5m3"),
    # What a reader that knows only float32 scales looks for.
    "old reader": lambda _, info: info.pop("scale_format"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_damaged_scales_name_the_layer(network, tmp_path, name, change):
    file = tmp_path / "model.safetensors"
    save_packed(
        file, Weights(variables=network[0], qparams=network[2](name)), model={"name": "mine"}
    )
    _rewritten(file, CHANGES[change])
    with pytest.raises(PackedFileError, match=r"model\.safetensors.*layer 'head'"):
        load_packed(file, Model())


@pytest.mark.parametrize(
    "change",
    [lambda a: a.pop("params/head/kernel:scale_tensor"), lambda a: _set(a, "scale_t", np.ravel)],
    ids=["gone", "shape"],
)
def test_the_float_of_the_tensor_belongs_to_the_scales(network, tmp_path, change):
    file = tmp_path / "model.safetensors"
    save_packed(
        file, Weights(variables=network[0], qparams=network[2]("nvfp4")), model={"name": "mine"}
    )
    _rewritten(file, lambda arrays, _: change(arrays))
    with pytest.raises(PackedFileError, match=r"layer 'head'.*scale_tensor"):
        load_packed(file, Model())


def test_a_scale_that_its_format_does_not_hold_names_the_layer(tmp_path):
    """A block scale of 2^-141, where the least of e8m0 is 2^-127."""
    kernel = jnp.full((32, 1), 2.0**-126)
    reach = jnp.full((1, 1), 2.0**-110)
    quantizer = grid.from_range(-reach, reach, 8, format="mxfp8_e5m2")
    quantizer = quantizer.replace(scale=jnp.full((1, 1), 2.0**-141 * 1.75))
    with pytest.raises(ValueError, match=r"layer 'head': a scale of .* format 'e8m0'"):
        save_packed(
            tmp_path / "m",
            Weights(
                variables={"params": {"head": {"kernel": kernel}}},
                qparams={"head": {"weights": quantizer}},
            ),
            model={"name": "mine"},
        )
    assert not (tmp_path / "m").exists()


def test_the_same_scales_in_float_give_the_same_model(network, tmp_path):
    """The rounded scales as float32 under ":scale"."""
    qparams = network[2]("nvfp4")
    now, before = tmp_path / "now", tmp_path / "before"
    save_packed(now, Weights(variables=network[0], qparams=qparams), model={"name": "mine"})
    rounded = {
        path: {
            "weights": of["weights"].replace(
                scale=grid.over_stack(lambda _, q: grid.with_rounded_scale(q).scale, of["weights"])(
                    quantize.layers.at_path(network[0]["params"], path)["kernel"], of["weights"]
                ),
                scale_format="",
            )
        }
        for path, of in qparams.items()
    }
    save_packed(before, Weights(variables=network[0], qparams=rounded), model={"name": "mine"})
    assert "params/head/kernel:scale" in safetensors.numpy.load_file(before)
    a, b = (load_packed(file, Model()).variables for file in (now, before))
    jax.tree.map(np.testing.assert_array_equal, a, b)
