"""Packed files: how small they are, what they give back, what they refuse."""

import errno
import json
import os
import re
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kdq import models, quantize
from kdq.deploy import PackedFileError, load_packed, save_packed
from kdq.deploy.formats import container
from kdq.quantize import MinMax, QuantizationRule, TensorSpec
from kdq.quantize.network import Weights

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
    return quantize.calibrate(model, variables, rules, [images])


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        pytest.param(k, b, marks=() if b == 3 else pytest.mark.slow)
        for k in WEIGHTS
        for b in range(1, 9)
        if (k, b) != ("narrow_channel", 1)  # one code
    ],
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
    size = save_packed(
        file, Weights(variables=variables, qparams=qparams), model=CNN, metadata={"arm": "a"}
    )
    assert size == os.stat(file).st_size

    packed = load_packed(file)
    expected = quantize.predict(model, variables, qparams, images)
    np.testing.assert_allclose(packed(images), expected, rtol=1e-5, atol=1e-5)
    # The comparison means something: the float model gives other numbers.
    assert np.abs(expected - quantize.predict(model, variables, {}, images)).max() > 1e-4
    assert packed.metadata == {"arm": "a"}
    assert packed.network.module == model
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
    save_packed(tmp_path / "float", Weights(variables=variables, qparams={}), model=CNN)
    loaded = load_packed(tmp_path / "float")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    expected = quantize.predict(model, variables, {}, images)
    np.testing.assert_allclose(loaded(images), expected, rtol=1e-5, atol=1e-5)

    qparams = calibrated(network, None, TensorSpec(bits=3, granularity="per_channel"))
    save_packed(tmp_path / "activations", Weights(variables=variables, qparams=qparams), model=CNN)
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


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "most"), [(4, 4.2), (2, 2.2), (3, 3.2), (1, 1.2)])
def test_a_large_layer_takes_its_bits_on_disk(tmp_path, bits, most):
    model, inputs = OneLayer(), jax.random.normal(jax.random.key(0), (4, 1024))
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    spec = TensorSpec(bits=bits, granularity="per_channel")
    rules = (QuantizationRule(path="dense", weights=spec),)
    qparams = quantize.calibrate(model, variables, rules, [inputs])
    file = tmp_path / "dense.safetensors"
    save_packed(file, Weights(variables=variables, qparams=qparams), model={"name": "mine"})
    bits_a_weight = 8 * os.stat(file).st_size / 1024**2
    assert bits <= bits_a_weight <= most
    loaded = load_packed(file, model)
    expected = quantize.predict(model, variables, qparams, inputs)
    np.testing.assert_allclose(loaded(inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_one_layer(tmp_path):
    model, inputs = Bare(3), jax.random.normal(jax.random.key(0), (4, 6))
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    spec = TensorSpec(bits=4)
    rules = (QuantizationRule(path="", weights=spec, activations=spec),)
    qparams = quantize.calibrate(model, variables, rules, [inputs])
    save_packed(
        tmp_path / "bare", Weights(variables=variables, qparams=qparams), model={"name": "mine"}
    )
    expected = quantize.predict(model, variables, qparams, inputs)
    loaded = load_packed(tmp_path / "bare", model)
    np.testing.assert_allclose(loaded(inputs), expected, rtol=1e-5, atol=1e-5)


# What it refuses.


@pytest.fixture
def good(network, tmp_path):
    """A packed file with weights and activations quantized."""
    _, variables, _ = network
    spec = TensorSpec(bits=4, granularity="per_channel")
    qparams = calibrated(network, spec, TensorSpec(bits=4))
    file = tmp_path / "model.safetensors"
    save_packed(file, Weights(variables=variables, qparams=qparams), model=CNN)
    load_packed(file)
    return file


def rewritten(file, change):
    """`file` with its tensors and kdq document passed through `change`; its checksum is right."""
    document, arrays = container.read(file)
    change(arrays, document)
    container.write(file, document, arrays)
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
    with pytest.raises(PackedFileError, match=r"format=1; this kdq reads 3 and 4"):
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
        save_packed(good, Weights(variables=network[1], qparams={}), model=CNN)
    assert good.read_bytes() == before
    assert os.listdir(good.parent) == [good.name]


def test_saving_twice_gives_the_same_bytes(network, tmp_path):
    spec = TensorSpec(bits=3, granularity="per_channel", symmetric=False)
    qparams = calibrated(network, spec, TensorSpec(bits=3))
    for name in ("one", "two"):
        save_packed(
            tmp_path / name,
            Weights(variables=network[1], qparams=qparams),
            model=CNN,
            metadata={"seed": 1},
        )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


FIELDS = {
    "kdq.layers.conv_1.weight.bits='4'": lambda layer, _: layer["weight"].update(bits="4"),
    "key in kdq.layers.conv_1.weight: 'bit'": lambda layer, _: layer["weight"].update(bit=4),
    "kdq.layers.conv_1.weight.shape[0]='3'": lambda layer, _: layer["weight"].update(shape=["3"]),
    "kdq.layers.conv_1.weight.qmin is missing": lambda layer, _: layer["weight"].pop("qmin"),
    "kdq.layers=3": lambda _, document: document.update(layers=3),
    "weight.qmin=": lambda layer, _: layer["weight"].update(qmin={"a": 1}),
    "weight.shape=(-1, 3)": lambda layer, _: layer["weight"].update(shape=[-1, 3]),
    "inputs.activations.scale=": lambda layer, _: layer["inputs"]["activations"].update(scale="x"),
    "field of model 'cnn': 'width'": lambda _, document: document["model"].update(width=1),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_field_is_named(good, field):
    rewritten(good, lambda _, document: FIELDS[field](document["layers"]["conv_1"], document))
    with pytest.raises(PackedFileError, match=rf"model\.safetensors.*{re.escape(field)}"):
        load_packed(good)


def test_a_bit_that_flipped_is_found(good):
    data = bytearray(good.read_bytes())
    data[-3] ^= 4  # of a tensor: the file is as readable as before
    good.write_bytes(data)
    with pytest.raises(PackedFileError, match="it is damaged"):
        load_packed(good)


def _peak(function):
    """The most memory that a call held at once, in bytes of NumPy and Python."""
    tracemalloc.start()
    try:
        with pytest.raises(PackedFileError):
            function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [[3, 3, 4, 2**40], [2**31, 2**31, 2**31], [10**9]])
def test_a_shape_that_the_codes_do_not_fill_takes_no_memory(good, shape):
    rewritten(good, lambda _, d: d["layers"]["conv_1"]["weight"].update(shape=shape))
    assert _peak(lambda: load_packed(good)) < 2**20


def test_an_offset_beyond_the_file_takes_no_memory(good):
    data = good.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[KERNEL]["shape"] = [2**40]
    header[KERNEL]["data_offsets"][1] = header[KERNEL]["data_offsets"][0] + 2**40
    text = json.dumps(header).encode()
    good.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert _peak(lambda: load_packed(good)) < 2**20
    good.write_bytes((2**62).to_bytes(8, "little") + text)
    assert _peak(lambda: load_packed(good)) < 2**20


@pytest.mark.slow
def test_mutations_load_or_are_refused(good):
    """Files with some bytes changed, cut out or put in; half of them with a new checksum."""
    rng = np.random.default_rng(0)
    data, document_and_arrays = good.read_bytes(), container.read(good)
    unpacked = sum(4 * a.size * 2 for a in document_and_arrays[1].values())  # float32 of 4 bits
    loaded, peak, messages = 0, 0, set()
    tracemalloc.start()
    for index in range(2000):
        if index % 2:
            _mutated(good, data, rng)
        else:
            _mutated_inside(good, *document_and_arrays, rng)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            load_packed(good)
            loaded += 1
        except PackedFileError as error:
            messages.add(str(error).startswith(str(good)))
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert messages == {True}
    assert 0 < loaded < 1000  # some of what has a right checksum is a model
    assert peak < 2 * (len(data) + unpacked) + 2**18  # and what Python itself needs


def _mutated(path, data, rng):
    """Writes `data` with a few bytes changed, or a piece cut out or put in."""
    mutated, start = bytearray(data), int(rng.integers(len(data)))
    kind = rng.integers(4)
    if kind == 0:
        for place in rng.integers(len(data), size=rng.integers(1, 8)):
            mutated[place] = rng.integers(256)
    elif kind == 1:
        del mutated[start : start + int(rng.integers(1, 200))]
    elif kind == 2:
        mutated[start:start] = rng.bytes(int(rng.integers(1, 200)))
    else:
        mutated[start] ^= 1 << int(rng.integers(8))
    path.write_bytes(mutated)


VALUES = [None, 0, -1, 1.5, 2**70, "", "x", [], [1], [[1], [2, 3]], {}, True, 1e300]


def _mutated_inside(path, document, arrays, rng):
    """Writes the file with a value of its document, or a tensor, replaced."""
    document, arrays = json.loads(json.dumps(document)), dict(arrays)
    if rng.random() < 0.7:
        places = list(_places(document))
        place, key = places[rng.integers(len(places))]
        place[key] = VALUES[rng.integers(len(VALUES))]
    else:
        name = sorted(arrays)[rng.integers(len(arrays))]
        array = arrays.pop(name)
        changes = [
            lambda a: a.astype(np.int16),
            lambda a: np.ravel(a)[1:].copy(),
            lambda a: np.broadcast_to(a, (2, *a.shape)).copy(),
            lambda a: np.frombuffer(rng.bytes(a.nbytes), a.dtype).reshape(a.shape),
            lambda a: None,
        ]
        changed = changes[rng.integers(len(changes))](array)
        if changed is not None:
            arrays[name if rng.random() < 0.8 else f"{name}/more"] = changed
    container.write(path, document, arrays)


def _places(value):
    """Every `(container, key)` of a JSON document."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield value, key
        yield from _places(value[key])


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_takes_no_more_than_the_codes(bits):
    count = 80_000
    packed = container.pack(np.arange(count) % 2**bits, bits)
    peaks = []
    for _ in range(3):  # whatever else runs in this process counts too
        tracemalloc.start()
        codes = container.unpack(packed, bits, count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    np.testing.assert_array_equal(codes, np.arange(count) % 2**bits)
    assert min(peaks) < 2.3 * count
