"""Packed files that somebody crafted, with a right checksum: each is refused as PackedFileError."""

import copy
import json
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from kdq import models, quantize
from kdq.deploy import ModelNotImportedError, PackedFileError, load_packed, save_packed
from kdq.deploy.formats import container
from kdq.quantize.network import Weights

CNN = {"name": "cnn", "num_classes": 10, "widths": [4, 6], "batch_norm": True}
X = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
KERNEL = "params/conv_1/kernel"
BIAS = "params/head/bias"
MEAN = "batch_stats/norm_0/mean"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A good file that states its inputs, and one that does not, as (document, arrays)."""
    model = models.build(**CNN)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    rules = quantize.uniform_rules(4, 8)
    qparams = quantize.calibrate(model, variables, rules, [X])
    path = tmp_path_factory.mktemp("packed") / "m"
    contents = {}
    for states, inputs in ((True, X[:1]), (False, None)):
        save_packed(
            path,
            Weights(variables=variables, qparams=qparams),
            model=CNN,
            inputs=inputs,
            metadata={"a": 1},
        )
        contents[states] = container.read(path)
        np.testing.assert_allclose(
            load_packed(path)(X), quantize.predict(model, variables, qparams, X), atol=1e-5
        )
    return contents


def weight(**fields):
    return lambda document, _: document["layers"]["conv_1"]["weight"].update(fields)


def taken(**fields):
    return lambda document, _: document["layers"]["conv_1"]["inputs"]["activations"].update(fields)


def filled(name, value):
    return lambda _, arrays: arrays.update({name: np.full_like(arrays[name], value)})


def replaced(name, array):
    return lambda _, arrays: arrays.update({name: array})


def model(**fields):
    return lambda document, _: document["model"].update(fields)


def top(**fields):
    return lambda document, _: document.update(fields)


CRAFTED = {
    "scale 0": filled(f"{KERNEL}:scale", 0),
    "scale -1": filled(f"{KERNEL}:scale", -1),
    "scale NaN": filled(f"{KERNEL}:scale", np.nan),
    "scale 1e38": filled(f"{KERNEL}:scale", 1e38),
    "scale 1e-45": filled(f"{KERNEL}:scale", 1e-45),
    "shape empty": weight(shape=[]),
    "shape [0]": weight(shape=[0]),
    "shape zero times huge": weight(shape=[0, 10**18]),
    "shape negative and even": weight(shape=[-8, -27]),
    "bits 0": weight(bits=0),
    "qmin nested": weight(qmin=[[[[[0]]]]]),
    "zero_point 1e30": weight(zero_point=1e30),
    "levels []": weight(levels=[]),
    "levels that fall": weight(levels=list(range(16, 0, -1))),
    "dtype of weight": weight(dtype="float64"),
    "array of another": weight(array=BIAS),
    "array nowhere": weight(array="params/zzz"),
    "scale_format": weight(scale_format="os"),
    "input scale 0": taken(scale=0.0),
    "input scale -1": taken(scale=-1.0),
    "input scale huge": taken(scale=[1.0] * 10**5),
    "input qmin above qmax": taken(qmin=1e6),
    "input zero_point 1e30": taken(zero_point=1e30),
    "input qmax 2**40": taken(qmax=2**40),
    "input dynamic": taken(dynamic={"granularity": "x"}),
    "input dynamic group": taken(dynamic={"granularity": "per_group"}),
    "input scale_format": taken(scale_format="nope"),
    "input levels ragged": taken(levels=[[1, 2], [3]]),
    "input of weights": lambda document, _: document["layers"]["conv_1"]["inputs"].update(
        weights={"scale": 1, "zero_point": 0, "qmin": 0, "qmax": 3}
    ),
    "NaN": filled(BIAS, np.nan),
    "infinity": filled(BIAS, np.inf),
    "infinite statistics": filled(MEAN, np.inf),
    "other dtype": replaced(BIAS, np.zeros(10, np.int32)),
    "other shape": replaced(BIAS, np.zeros(7, np.float32)),
    "scalar": replaced(BIAS, np.zeros((), np.float32)),
    "array missing": lambda _, arrays: arrays.pop(BIAS),
    "array extra": replaced("params/zzz/kernel", np.zeros(3, np.float32)),
    "collection extra": replaced("zzz/kernel", np.zeros(3, np.float32)),
    "array named params": replaced("params", np.zeros(3, np.float32)),
    "array around others": replaced("params/conv_1", np.zeros(3, np.float32)),
    "array without name": replaced("", np.zeros(3, np.float32)),
    "deep name": replaced("/".join("a" * 10_000), np.zeros(3, np.float32)),
    "renamed": lambda _, arrays: arrays.update({"params/x": arrays.pop(BIAS)}),
    "layer nowhere": lambda document, _: document["layers"].update(
        nope=copy.deepcopy(document["layers"]["conv_1"])
    ),
    "input of a layer nowhere": lambda document, _: document["layers"].update(
        nope={"inputs": document["layers"]["conv_1"]["inputs"]}
    ),
    "format True": top(format=True),
    "format 3.0": top(format=3.0),
    "format '3'": top(format="3"),
    "metadata list": top(metadata=[]),
    "tree": top(tree={"nodes": {"zzz": "int"}}),
    "inputs": top(inputs=[{"shape": [-1], "dtype": "float32"}]),
    "inputs dtype": top(inputs=[{"shape": [1], "dtype": "os"}]),
    "inputs huge": top(inputs=[{"shape": [2**31] * 8, "dtype": "float32"}]),
    "inputs of another model": top(inputs=[{"shape": [1, 8], "dtype": "float32"}]),
    "widths 1e9": model(widths=[10**9, 10**9]),
    "widths negative": model(widths=[-4, 6]),
    "widths text": model(widths="abc"),
    "widths mapping": model(widths={"a": 1}),
    "num_classes -1": model(num_classes=-1),
    "deep vit": model(**{**dict.fromkeys(("widths", "batch_norm")), "name": "vit"}),
    "parent": model(parent=1),
    "name 5": model(name=5),
    "name list": model(name=["cnn"]),
    "name of a function": model(name="os:system"),
    "name of a method": model(name="os:system.__call__"),
    "name of a class": model(name="subprocess:Popen", args="true"),
    "name of Flax": model(name="flax.linen:Dense", features=3),
}


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_file_is_refused(files, tmp_path, states, case):
    document, arrays = copy.deepcopy(files[states])
    CRAFTED[case](document, arrays)
    container.write(tmp_path / "m", document, arrays)
    # Only a file that does not say what the model takes may load, and be refused at its first call.
    use = load_packed if states else lambda path: load_packed(path)(X)
    with pytest.raises(PackedFileError, match=r"/m .*(no packed model|not fit its model|imported)"):
        use(tmp_path / "m")


class Deep(nn.Module):
    depth: int = 3

    @nn.compact
    def __call__(self, x, *, train=False):
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(2)(x))
        return x


def test_a_model_without_end_is_not_traced(tmp_path):
    model = {"name": f"{__name__}:Deep", "depth": 10**9}
    x = np.ones((1, 2), np.float32)
    variables = jax.jit(Deep().init)(jax.random.key(0), x)
    save_packed(tmp_path / "m", Weights(variables=variables, qparams={}), model=model, inputs=x)
    with pytest.raises(PackedFileError, match=r"the model makes more than 6 arrays"):
        load_packed(tmp_path / "m")


def test_a_file_of_another_dtype_of_safetensors_is_refused(files, tmp_path):
    path = tmp_path / "m"
    container.write(path, *copy.deepcopy(files[True]))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for dtype in ("F8_E4M3", "F8_E5M2", "BF16", "C64"):
        changed = copy.deepcopy(header)
        start, end = changed[BIAS]["data_offsets"]
        size = {"BF16": 2, "C64": 8}.get(dtype, 1)
        changed[BIAS] |= {"dtype": dtype, "shape": [(end - start) // size]}
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(PackedFileError, match=r"does not read|damaged"):
            load_packed(path)


def test_numbers_beyond_floats_in_the_document_are_refused(files, tmp_path):
    path = tmp_path / "m"
    container.write(path, *copy.deepcopy(files[True]))
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{\\"a\\":1}', b'{\\"a\\":9e999}'.ljust(9), 1))
    with pytest.raises(PackedFileError, match="is no packed model"):
        load_packed(path)


@pytest.mark.parametrize("states", [True, False])
def test_no_bit_of_a_file_can_flip_unseen(files, tmp_path, states):
    path = tmp_path / "m"
    container.write(path, *copy.deepcopy(files[states]))
    data = path.read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(data), 400, replace=False):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(PackedFileError):
            load_packed(path)


# Floats of another precision, variables of training, and models that are not there.


def test_a_network_that_was_cast_loads(files, tmp_path):
    model = models.build(**CNN)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), variables)
    save_packed(tmp_path / "m", Weights(variables=half, qparams={}), model=CNN, inputs=X[:1])
    loaded = load_packed(tmp_path / "m")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.variables)} == {"bfloat16"}
    np.testing.assert_array_equal(loaded(X), quantize.predict(model, half, {}, X))


class Counts(nn.Module):
    """Has a collection in training alone."""

    @nn.compact
    def __call__(self, x, *, train=False):
        if train:
            self.variable("counts", "steps", lambda: np.int32(0))
        return nn.Dense(2, name="dense")(x)


def test_variables_of_training_are_part_of_a_model(tmp_path):
    x = np.ones((1, 3), np.float32)
    for train in (True, False):
        variables = Counts().init(jax.random.key(0), x, train=train)
        save_packed(
            tmp_path / "m",
            Weights(variables=variables, qparams={}),
            model={"name": "mine"},
            inputs=x,
        )
        loaded = load_packed(tmp_path / "m", Counts())
        assert ("counts" in loaded.variables) == train
    variables["counts"] = {"other": np.int32(0)}
    save_packed(
        tmp_path / "m", Weights(variables=variables, qparams={}), model={"name": "mine"}, inputs=x
    )
    with pytest.raises(PackedFileError, match="counts/other is none of the model's arrays"):
        load_packed(tmp_path / "m", Counts())


NETS = """
import flax.linen as nn

class Net(nn.Module):
    width: int = 2

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(self.width, name="dense")(x)
"""


def test_a_class_that_is_not_imported_is_named_with_the_ways_to_load(tmp_path, monkeypatch):
    (tmp_path / "packed_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    x = np.ones((1, 3), np.float32)
    variables = {"params": {"dense": {"kernel": np.ones((3, 2), np.float32)}}}
    variables["params"]["dense"]["bias"] = np.zeros(2, np.float32)
    fields = {"name": "packed_nets:Net", "width": 2}
    save_packed(tmp_path / "m", Weights(variables=variables, qparams={}), model=fields, inputs=x)
    with pytest.raises(ModelNotImportedError) as caught:
        load_packed(tmp_path / "m")
    text = str(caught.value)
    assert "no packed model" not in text
    assert text.count("\n") == 0
    for part in ("packed_nets:Net", "`import packed_nets`", "load_packed(path, Net(...))", "allow"):
        assert part in text
    assert "packed_nets" not in sys.modules
    with pytest.raises(ModelNotImportedError):
        load_packed(tmp_path / "m", allow_models=["packed_net", "os"])
    np.testing.assert_array_equal(load_packed(tmp_path / "m", allow_models=["packed_nets"])(x), 3)
    np.testing.assert_array_equal(load_packed(tmp_path / "m")(x), 3)  # imported by now
    del sys.modules["packed_nets"]


def test_a_class_of_a_script_is_said_to_be_one(tmp_path):
    variables = {"params": {"a": np.ones(2, np.float32)}}
    save_packed(
        tmp_path / "m", Weights(variables=variables, qparams={}), model={"name": "__main__:Nett"}
    )
    message = r"Nett that was defined in a script or notebook.*pass the model: load_packed\(path,"
    with pytest.raises(ModelNotImportedError, match=message):
        load_packed(tmp_path / "m")


def test_naming_a_lazy_module_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "lazy_nets").mkdir()
    (tmp_path / "lazy_nets" / "__init__.py").write_text(
        "import importlib\n\ndef __getattr__(name):\n"
        "    return importlib.import_module(f'lazy_nets.{name}')\n"
    )
    (tmp_path / "lazy_nets" / "inner.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    import lazy_nets  # noqa: F401, PLC0415

    variables = {"params": {"a": np.ones(2, np.float32)}}
    save_packed(
        tmp_path / "m",
        Weights(variables=variables, qparams={}),
        model={"name": "lazy_nets:inner.Net"},
    )
    with pytest.raises(ModelNotImportedError):
        load_packed(tmp_path / "m")
    assert "lazy_nets.inner" not in sys.modules
    del sys.modules["lazy_nets"]


def test_the_text_of_a_loaded_model_is_a_summary(files, tmp_path):
    container.write(tmp_path / "m", *copy.deepcopy(files[True]))
    assert repr(load_packed(tmp_path / "m")) == (
        "PackedModel(CNN(num_classes=10, widths=(4, 6), strides=None, batch_norm=True, pool=False, "
        "dtype=float32); 12 arrays of 362 numbers; weights: 4 bits in 3 layers; inputs: 8 bits in "
        "3 layers; takes float32[1, 8, 8, 1]; metadata: a)"
    )
    container.write(tmp_path / "m", {**files[False][0], "layers": {}, "metadata": {}}, PLAIN)
    assert repr(load_packed(tmp_path / "m", Deep())) == (
        "PackedModel(Deep(depth=3); 1 arrays of 6 numbers; weights: float; inputs: float)"
    )


PLAIN = {"params/a": np.ones((2, 3), np.float32)}
