"""Packed files: how small they are, what they give back, what they refuse."""

import errno
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kdq import models, quantize
from kdq.deploy import PackedFileError, load_packed, save_packed
from kdq.quantize import MinMax, QuantizationRule, TensorSpec

CNN = {"name": "cnn", "num_classes": 10, "widths": [4, 6], "batch_norm": True}
WEIGHTS = {
    "symmetric_tensor": {},
    "symmetric_channel": {"granularity": "per_channel"},
    "narrow_channel": {"granularity": "per_channel", "narrow": True},
    "affine_tensor": {"symmetric": False, "observer": MinMax()},
    "affine_channel": {"symmetric": False, "granularity": "per_channel", "observer": MinMax()},
    "affine_group": {"symmetric": False, "granularity": "per_group", "observer": MinMax()},
    "symmetric_group": {"granularity": "per_group"},
}


@pytest.fixture(scope="module")
def network():
    """A model with batch statistics that are not the initial ones, and images."""
    model = models.build(**CNN)
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    # Off-centre: weights whose affine zero points differ from channel to channel.
    shift = lambda p: p + 0.3 * jnp.sin(jnp.arange(p.size).reshape(p.shape))
    variables = {
        "params": jax.tree.map(shift, variables["params"]),
        "batch_stats": jax.tree.map(lambda s: 0.5 + abs(shift(s)), variables["batch_stats"]),
    }
    return model, variables, images


def calibrated(network, weights, activations=None, path=".*"):
    model, variables, images = network
    rules = (QuantizationRule(path=path, weights=weights, activations=activations),)
    return quantize.calibrate(model, variables, rules, [images], train=False)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [(k, b) for k in WEIGHTS for b in range(1, 9) if (k, b) != ("narrow_channel", 1)],  # one code
)
def test_loaded_outputs_are_the_simulated_ones(network, tmp_path, kind, bits):
    model, variables, images = network
    fields, path = dict(WEIGHTS[kind]), ".*"
    if fields.get("granularity") == "per_group":
        fields["group_size"], path = 2, "conv_1|head"  # conv_0 has one input channel
    weight_only = bits % 2 == 0
    activations = None if weight_only else TensorSpec(bits=bits, symmetric=bits != 5)
    qparams = calibrated(network, TensorSpec(bits=bits, **fields), activations, path)
    file = tmp_path / "model.safetensors"
    size = save_packed(file, variables, qparams, model=CNN, metadata={"arm": "a"})
    assert size == os.stat(file).st_size

    packed = load_packed(file)
    expected = quantize.predict(model, variables, qparams, images)
    np.testing.assert_allclose(packed(images), expected, rtol=1e-5, atol=1e-5)
    # The comparison means something: the float model gives other numbers.
    assert np.abs(expected - quantize.predict(model, variables, {}, images)).max() > 1e-4
    assert packed.metadata == {"arm": "a"}
    assert packed.model == model
    for layer, quantizers in qparams.items():
        at = packed.variables["params"][layer]["kernel"]
        simulated = quantize.fake_quantize(
            variables["params"][layer]["kernel"], quantizers["weights"]
        )
        np.testing.assert_array_equal(at, simulated)
        stored = safetensors.numpy.load_file(file)[f"params/{layer}/kernel"]
        assert (stored.dtype, stored.size) == (np.uint8, -(-at.size * bits // 8))


def test_float_model_and_activations_only(network, tmp_path):
    model, variables, images = network
    save_packed(tmp_path / "float", variables, {}, model=CNN)
    loaded = load_packed(tmp_path / "float")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    expected = quantize.predict(model, variables, {}, images)
    np.testing.assert_allclose(loaded(images), expected, rtol=1e-5, atol=1e-5)

    qparams = calibrated(network, None, TensorSpec(bits=3, granularity="per_channel"))
    save_packed(tmp_path / "activations", variables, qparams, model=CNN)
    loaded = load_packed(tmp_path / "activations")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    expected = quantize.predict(model, variables, qparams, images)
    np.testing.assert_allclose(loaded(images), expected, rtol=1e-5, atol=1e-5)


class OneLayer(nn.Module):
    """A model that is not in kdq.models."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(1024, name="dense")(x)


class Bare(nn.Dense):
    """A model that is a layer itself: its path is ""."""

    def __call__(self, x, *, train=False):
        return super().__call__(x)


@pytest.mark.parametrize(("bits", "most"), [(4, 4.2), (2, 2.2), (3, 3.2), (1, 1.2)])
def test_a_large_layer_takes_its_bits_on_disk(tmp_path, bits, most):
    model, inputs = OneLayer(), jax.random.normal(jax.random.key(0), (4, 1024))
    variables = model.init(jax.random.key(1), inputs)
    spec = TensorSpec(bits=bits, granularity="per_channel")
    rules = (QuantizationRule(path="dense", weights=spec),)
    qparams = quantize.calibrate(model, variables, rules, [inputs], train=False)
    file = tmp_path / "dense.safetensors"
    save_packed(file, variables, qparams, model={"name": "mine"})
    bits_a_weight = 8 * os.stat(file).st_size / 1024**2
    assert bits <= bits_a_weight <= most
    loaded = load_packed(file, model=model)
    expected = quantize.predict(model, variables, qparams, inputs)
    np.testing.assert_allclose(loaded(inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_one_layer(tmp_path):
    model, inputs = Bare(3), jax.random.normal(jax.random.key(0), (4, 6))
    variables = model.init(jax.random.key(1), inputs)
    spec = TensorSpec(bits=4)
    rules = (QuantizationRule(path="", weights=spec, activations=spec),)
    qparams = quantize.calibrate(model, variables, rules, [inputs], train=False)
    save_packed(tmp_path / "bare", variables, qparams, model={"name": "mine"})
    expected = quantize.predict(model, variables, qparams, inputs)
    loaded = load_packed(tmp_path / "bare", model=model)
    np.testing.assert_allclose(loaded(inputs), expected, rtol=1e-5, atol=1e-5)


# What it refuses.


@pytest.fixture
def good(network, tmp_path):
    """A packed file with weights and activations quantized."""
    _, variables, _ = network
    spec = TensorSpec(bits=4, granularity="per_channel")
    qparams = calibrated(network, spec, TensorSpec(bits=4))
    file = tmp_path / "model.safetensors"
    save_packed(file, variables, qparams, model=CNN)
    load_packed(file)
    return file


def rewritten(file, change):
    """`file` with its tensors and kdq document passed through `change`."""
    with safetensors.safe_open(file, framework="numpy") as opened:
        document = json.loads(opened.metadata()["kdq"])
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(arrays, document)
    safetensors.numpy.save_file(arrays, file, metadata={"kdq": json.dumps(document)})
    return file


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no packed model at .*gone\.safetensors"):
        load_packed(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\xff" * 64])
def test_not_safetensors(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(PackedFileError, match=r"x\.safetensors is no packed model"):
        load_packed(file)


@pytest.mark.parametrize("metadata", [None, {"other": "{}"}])
def test_a_safetensors_file_of_someone_else(tmp_path, metadata):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(2)}, file, metadata=metadata)
    with pytest.raises(PackedFileError, match=r"x\.safetensors is no packed model.*no 'kdq'"):
        load_packed(file)


@pytest.mark.parametrize("text", ["not JSON", "[]", "{}"])
def test_a_kdq_entry_that_is_no_document(tmp_path, text):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(2)}, file, metadata={"kdq": text})
    with pytest.raises(PackedFileError, match=r"x\.safetensors"):
        load_packed(file)


def test_another_format_version(good):
    rewritten(good, lambda arrays, document: document.update(format=1))
    with pytest.raises(PackedFileError, match=r"has format 1; this kdq reads 2"):
        load_packed(good)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated(good, share):
    data = good.read_bytes()
    good.write_bytes(data[: int(share * len(data))])
    with pytest.raises(PackedFileError, match=r"model\.safetensors is no packed model"):
        load_packed(good)


KERNEL = "params/conv_1/kernel"


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays, _: arrays.update({KERNEL: arrays[KERNEL][:-1]}),
        lambda arrays, _: arrays.update({KERNEL: arrays[KERNEL].astype(np.float32)}),
        lambda arrays, _: arrays.pop(KERNEL),
        lambda arrays, _: arrays.pop(f"{KERNEL}:scale"),
        lambda arrays, _: arrays.update({f"{KERNEL}:scale": np.ones((1, 1, 1, 4), np.float32)}),
        lambda _, document: document["layers"]["conv_1"]["weight"].update(bits=3),
        lambda _, document: document["layers"]["conv_1"]["weight"].update(shape=[3, 3, 4, 7]),
        lambda _, document: document["layers"]["conv_1"]["weight"].update(zero_point=None),
    ],
    ids=["short", "type", "no_codes", "no_scale", "scale_shape", "bits", "shape", "no_zero_point"],
)
def test_tensors_that_do_not_fit_name_the_layer(good, change):
    rewritten(good, change)
    with pytest.raises(PackedFileError, match=r"model\.safetensors.*layer 'conv_1'"):
        load_packed(good)


def test_a_failed_write_leaves_the_old_file(good, network, monkeypatch):
    before = good.read_bytes()

    def fail(source, target):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"disk full.*model\.safetensors"):
        save_packed(good, network[1], {}, model=CNN)
    assert good.read_bytes() == before
    assert os.listdir(good.parent) == [good.name]


def test_saving_twice_gives_the_same_bytes(network, tmp_path):
    spec = TensorSpec(bits=3, granularity="per_channel", symmetric=False)
    qparams = calibrated(network, spec, TensorSpec(bits=3))
    for name in ("one", "two"):
        save_packed(tmp_path / name, network[1], qparams, model=CNN, metadata={"seed": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
