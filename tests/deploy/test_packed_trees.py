"""Packed files of any tree of variables: every dtype, container and name comes back as it was."""

import hashlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import core
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdq import quantize
from kdq.deploy import PackedFileError, load_packed, save_packed
from kdq.deploy.formats import trees
from kdq.quantize import uniform_rules
from kdq.quantize.network import Weights

FLOATS = ["float16", "bfloat16", "float32"]
SMALL_FLOATS = sorted(n for n in dir(ml_dtypes) if n.startswith(("float8_", "float4_")))
WHOLE = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32"]
TINY = ["int2", "int4", "uint2", "uint4"]
WIDE = ["int64", "uint64", "float64", "complex128"]  # of NumPy: JAX without 64 bits has none

KEYS = st.one_of(
    st.sampled_from(
        ["kernel", "Dense_0", "a/b", "/", "", "x:scale", "%2F", "__metadata__", "é", "0"]
    ),
    st.text(max_size=6),
)


@st.composite
def arrays(draw):
    """An array of any dtype that has one, of JAX or NumPy, finite."""
    name = draw(st.sampled_from([*FLOATS, *SMALL_FLOATS, *WHOLE, *TINY, *WIDE, "complex64"]))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    values = draw(hnp.arrays(np.float32, shape, elements=st.integers(1, 3)))
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    array = values.astype(dtype)
    if name in WIDE:
        return np.asarray(array * 2**40 if "int" in name else array / 3)
    return jnp.asarray(array)


LEAVES = st.one_of(
    arrays(),
    st.builds(lambda n: jax.random.key(n), st.integers(0, 9)),
    st.builds(lambda n: jax.random.split(jax.random.key(n, impl="rbg"), 2), st.integers(0, 9)),
    st.builds(lambda n, shape: jnp.full(shape, float(n)), st.integers(0, 9), st.just((2,))),
    st.builds(lambda n: nn.Partitioned(jnp.full((2, 3), n), (None, "model")), st.integers(0, 9)),
    st.builds(lambda n: nn.LogicallyPartitioned(jnp.arange(n), ("embed",)), st.integers(1, 9)),
    st.none(),
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.dictionaries(KEYS, inner, max_size=3),
            st.lists(inner, max_size=2),
            st.lists(inner, max_size=2).map(tuple),
        ),
        max_leaves=6,
    ),
    max_size=3,
)


def same(there, here):
    """Asserts that two trees are equal in structure, kinds, dtypes and every bit."""
    assert type(there) is type(here), (there, here)
    if isinstance(here, dict):
        assert there.keys() == here.keys()
        for key in here:
            same(there[key], here[key])
    elif isinstance(here, list | tuple):
        assert len(there) == len(here)
        for read, written in zip(there, here, strict=True):
            same(read, written)
    elif isinstance(here, nn.meta.AxisMetadata):
        assert there.names == here.names
        same(there.value, here.value)
    elif hasattr(here, "dtype"):
        assert (there.dtype, there.shape) == (here.dtype, here.shape)
        if jnp.issubdtype(here.dtype, jax.dtypes.prng_key):
            there, here = jax.random.key_data(there), jax.random.key_data(here)
        elif isinstance(here, jax.Array):
            assert there.weak_type == here.weak_type
        assert np.asarray(there).tobytes() == np.asarray(here).tobytes()
    else:
        assert there == here


class Empty(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return x


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_tree_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    save_packed(path, Weights(variables=tree, qparams={}), model={"name": "mine"})
    same(load_packed(path, Empty()).variables, tree)


def test_a_frozen_dict_comes_back_as_a_dict(tmp_path):
    tree = {"params": {"a": {"b": jnp.arange(3.0)}, "c": {}}}
    save_packed(
        tmp_path / "m", Weights(variables=core.freeze(tree), qparams={}), model={"name": "mine"}
    )
    same(load_packed(tmp_path / "m", Empty()).variables, tree)


def test_names_in_the_file_are_those_of_the_tree(tmp_path):
    tree = {"params": {"Dense_0": {"kernel": jnp.ones((2, 3))}, "a/b:c": jnp.zeros(())}}
    save_packed(tmp_path / "m", Weights(variables=tree, qparams={}), model={"name": "mine"})
    stored = safetensors.numpy.load_file(tmp_path / "m")
    assert {name: array.shape for name, array in stored.items()} == {
        "params/Dense_0/kernel": (2, 3),
        "params/a%2Fb%3Ac": (),
    }


DEEP: dict = {}
for _ in range(100):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"params": {"a": "text"}}, r"'params/a' is a str of str"),
        ({"params": {"a": object()}}, r"'params/a' is a object of object"),
        ({"params": {1: jnp.ones(2)}}, r"'params' has the key 1: expected strings"),
        ({"params": {"a": jnp.float32(np.nan)}}, r"params/a holds nan: expected finite"),
        ({"params": {"a": jnp.bfloat16(np.inf)}}, r"params/a holds inf: expected finite"),
        ({"params": {"a": jnp.float8_e5m2(np.inf)}}, r"params/a holds inf: expected finite"),
        ({"masks": {"a": jnp.float32(np.nan)}}, r"masks/a holds nan: expected finite"),
        ({"params": {"a": nn.meta.unbox}}, r"'params/a' is a function"),
        (DEEP, r"expected at most 64 keys"),
    ],
)
def test_what_a_file_can_not_hold_is_refused(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        save_packed(tmp_path / "m", Weights(variables=tree, qparams={}), model={"name": "mine"})
    assert not list(tmp_path.iterdir())


def test_a_mask_of_infinities_is_kept(tmp_path):
    tree = {"masks": {"causal": jnp.where(jnp.tri(3) > 0, 0.0, -jnp.inf)}}
    save_packed(tmp_path / "m", Weights(variables=tree, qparams={}), model={"name": "mine"})
    same(load_packed(tmp_path / "m", Empty()).variables, tree)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["nodes"].update({"a/x": "list"}),
        lambda tree: tree["nodes"].update({"zzz": "int"}),
        lambda tree: tree["nodes"].update({"a": "int"}),
        lambda tree: tree["nodes"].update({"a/x": {"partitioned": 3}}),
        lambda tree: tree["nodes"].update({"a/x": {"os.system": ["x"]}}),
        lambda tree: tree["nodes"].update({"a/x": 5}),
        lambda tree: tree["nodes"].update({"/".join("a" * 99): "dict"}),
        lambda tree: tree["dtypes"].update({"a/x": "float8_e5m2"}),
        lambda tree: tree["dtypes"].update({"a/y": "int3"}),
        lambda tree: tree["dtypes"].update({"zzz": "int4"}),
        lambda tree: tree["dtypes"].update({"a/k": "key:mine"}),
        lambda tree: tree["dtypes"].update({"a/x": "key:rbg"}),
        lambda tree: tree.update(weak=("a/z",)),
        lambda tree: tree.update(weak=("a/y",)),
    ],
)
def test_a_structure_that_is_no_trees_is_refused(change):
    tree = {"a": {"x": jnp.ones(2), "y": jnp.ones(2, jnp.float8_e5m2), "k": jax.random.key(0)}}
    stored, structure = trees.flatten({**tree, "empty": {}})
    same(trees.unflatten(stored, trees.Structure(**structure)), {**tree, "empty": {}})
    change(structure)
    with pytest.raises(ValueError, match=r"nodes|dtypes|weak|is no|keys"):
        trees.unflatten(stored, trees.Structure(**structure))


# Quantized layers of any float dtype, under any name.


class Net(nn.Module):
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False):
        kinds = {"param_dtype": self.dtype}
        x = nn.PReLU(**kinds)(nn.Dense(16, name="a/b", **kinds)(x))
        t = self.param("temperature", lambda key: jnp.asarray(2.0))  # weakly typed
        self.variable("state", "steps", lambda: jnp.zeros((), jnp.int32))
        return nn.Dense(3, kernel_init=boxed, **kinds)(x) / t


boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
X = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantized_outputs_are_the_simulated_ones_in_every_dtype(tmp_path, dtype):
    model = Net(jnp.dtype(dtype))
    variables = jax.jit(model.init)(jax.random.key(0), X)
    plain = nn.meta.unbox(variables)
    qparams = quantize.calibrate(model, plain, uniform_rules(4, 8), [X])
    assert set(qparams) == {"a/b", "Dense_0"}
    expected = quantize.predict(model, plain, qparams, X)
    for inputs in (None, X[:1]):
        save_packed(
            tmp_path / "m",
            Weights(variables=variables, qparams=qparams),
            model={"name": "mine"},
            inputs=inputs,
        )
        loaded = load_packed(tmp_path / "m", model)
        outputs = loaded(X)
        assert outputs.dtype == expected.dtype
        np.testing.assert_array_equal(outputs, expected)
        assert jax.tree.structure(loaded.variables) == jax.tree.structure(variables)
        kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        assert kinds(loaded.variables) == kinds(variables)


def test_a_weight_that_can_not_be_packed_is_named(tmp_path):
    model = Net()
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), X))
    qparams = quantize.calibrate(model, variables, uniform_rules(4, 8), [X])
    kernel = variables["params"]["a/b"]["kernel"].astype(jnp.float8_e4m3fn)
    variables["params"]["a/b"]["kernel"] = kernel
    with pytest.raises(ValueError, match=r"layer 'a/b': its weight is float8_e4m3fn: expected one"):
        save_packed(
            tmp_path / "m", Weights(variables=variables, qparams=qparams), model={"name": "mine"}
        )


# Files of version 3, byte by byte.


def version_3(path, arrays, layers):
    """Writes a file as kdq did before its version 4."""
    document = {"format": 3, "model": {"name": "mine"}, "layers": layers, "metadata": {"a": 1}}
    digest = hashlib.sha256(json.dumps(document, separators=(",", ":")).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(array.tobytes())
    text = json.dumps({**document, "sha256": digest.hexdigest()}, separators=(",", ":"))
    header, body = {"__metadata__": {"kdq": text}}, b""
    names = {"float32": "F32", "uint8": "U8"}
    for name, array in arrays.items():
        offsets = [len(body), len(body) + array.nbytes]
        dtype, shape = names[str(array.dtype)], list(array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += array.tobytes()
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


class Dense(nn.Module):
    scalar: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        y = nn.Dense(2, name="dense")(x)
        return y * self.param("gain", nn.initializers.ones, ()) if self.scalar else y


OLD = {
    # Codes 1 2 / 15 0 / 7 8 of 4 bits, two a byte, the first in the low bits; -8 is code 0.
    "params/dense/kernel": np.array([0x21, 0x0F, 0x87], np.uint8),
    "params/dense/kernel:scale": np.array([[0.5, 0.25]], np.float32),
    "params/dense/bias": np.array([1, -1], np.float32),
}
OLD_LAYERS = {
    "dense": {
        "weight": {"name": "kernel", "shape": [3, 2], "bits": 4, "qmin": -8, "zero_point": 0},
        "inputs": {"activations": {"scale": 0.5, "zero_point": 0, "qmin": -4, "qmax": 3}},
    }
}
KERNEL = (np.array([[1, 2], [15, 0], [7, 8]]) - 8) * [0.5, 0.25]


def test_a_file_of_version_3_loads(tmp_path):
    version_3(tmp_path / "m", OLD, OLD_LAYERS)
    loaded = load_packed(tmp_path / "m", Dense())
    np.testing.assert_array_equal(loaded.variables["params"]["dense"]["kernel"], KERNEL)
    x = np.array([[0.6, 9.0, -9.0], [0.2, 0.3, -0.8]], np.float32)
    rounded = np.array([[0.5, 1.5, -2.0], [0.0, 0.5, -1.0]])
    np.testing.assert_allclose(loaded(x), rounded @ KERNEL + [1, -1], atol=1e-6)
    assert loaded.metadata == {"a": 1}


def test_a_scalar_of_version_3_is_refused_with_the_way_out(tmp_path):
    version_3(tmp_path / "m", {**OLD, "params/gain": np.ones(1, np.float32)}, OLD_LAYERS)
    loaded = load_packed(tmp_path / "m", Dense(scalar=True))
    with pytest.raises(PackedFileError, match=r"params/gain is float32\[1\].*pack the model again"):
        loaded(np.ones((1, 3), np.float32))
