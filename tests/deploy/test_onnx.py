"""ONNX files in ONNX Runtime against the integer models that they are of."""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import lowered, network

from kdq import deploy, quantize
from kdq.quantize import QuantizationRule, TensorSpec
from kdq.quantize.network import Weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("jax2onnx")

slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
DEFAULT = [("mlp", (8, 8)), ("resnet", (2, 8))]
CASES = [
    (name, bits) if (name, bits) in DEFAULT else slow(name, bits)
    for name in ("mlp", "cnn", "pooled", "resnet")
    for bits in [(8, 8), (4, 8), (4, 4), (2, 8)]
]


@jax.jit
def _made(integer, inputs):
    made = {}
    return {"output": integer.apply(inputs, unroll=True, integers=made)} | made


def _both(integer, inputs):
    """`{name: array}` of what each layer makes, and the outputs: of JAX, and of ONNX Runtime."""
    ours = _made(integer, inputs)
    proto = deploy.to_onnx(integer, inputs, each_layer=True)
    onnx.checker.check_model(proto, full_check=True)
    session = deploy.onnx_session(proto.SerializeToString())
    arrays = inputs if isinstance(inputs, tuple) else (inputs,)
    feeds = {i.name: np.asarray(a) for i, a in zip(session.get_inputs(), arrays, strict=True)}
    theirs = session.run(None, feeds)
    theirs = dict(zip(["output", *deploy.layer_names(integer, inputs)], theirs, strict=True))
    return ours, theirs


def _equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(np.asarray(array), theirs[name], err_msg=name)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_every_layer_makes_the_same_integers(name, bits):
    model, variables, images = network(name, offsets=0.5)
    integer, qparams = lowered(model, variables, images, quantize.uniform_rules(*bits))
    ours, theirs = _both(integer, images)
    assert set(qparams) < set(ours)
    assert all(np.ptp(array) > 0 for array in theirs.values())
    _equal(ours, theirs)


@pytest.mark.slow
def test_a_transformer_differs_where_floats_between_its_layers_do():
    model, variables, images = network("vit")
    integer, qparams = lowered(model, variables, images, quantize.uniform_rules(8, 8))
    ours, theirs = _both(integer, images)
    assert set(qparams) < set(ours)
    for path in qparams:
        codes = [name for name in ours if name.startswith(f"{path}/")]
        same = [np.asarray(ours[name]) == theirs[name] for name in codes]
        assert all(one.mean() > 0.99 for one in same)
        # Of examples that come with the same codes the layer makes the same.
        alike = np.all([one.reshape(len(one), -1).all(1) for one in same], axis=0)
        assert alike.mean() > 0.5
        np.testing.assert_array_equal(np.asarray(ours[path])[alike], theirs[path][alike])
    np.testing.assert_allclose(ours["output"], theirs["output"], atol=0.05)


def test_jax_is_left_as_it_was():
    """jax2onnx traces with functions of its own in place of JAX's."""
    modules = (jnp, jax.lax, jax.nn, jax.random, nn)
    before = {(module, name): getattr(module, name) for module in modules for name in dir(module)}
    model, variables, images = network("mlp")
    integer, _ = lowered(model, variables, images, quantize.uniform_rules(8, 8))
    deploy.to_onnx(integer, images)
    assert not [name for (module, name), was in before.items() if getattr(module, name) is not was]
    np.testing.assert_array_equal(jnp.cumsum(jnp.ones((2, 3)), -1)[:, -1], 3)


def test_a_batch_of_any_size():
    model, variables, images = network("mlp")
    integer, _ = lowered(model, variables, images, quantize.uniform_rules(4, 8))
    session = deploy.onnx_session(deploy.to_onnx(integer, images[:1]).SerializeToString())
    for size in (1, 5, 64):
        (outputs,) = session.run(None, {"input": np.asarray(images[:size])})
        np.testing.assert_array_equal(outputs, integer(images[:size]))


class Variants(nn.Module):
    """Products of every form that a layer may have."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, name="strided")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=2, kernel_dilation=2, name="grouped")(x)
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.ConvTranspose(6, (2, 2), strides=(2, 2), name="transposed")(x)
        x = nn.ConvTranspose(6, (3, 3), padding="VALID", name="cropped")(x)
        x = nn.Conv(4, (3,), padding="CIRCULAR", name="line")(x.reshape(x.shape[0], -1, 6))
        x = nn.DenseGeneral((2, 3), name="general")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), name="joint")(x)
        x = nn.Einsum((4, 5), "bti,oi->otb", use_bias=False, name="swapped")(x)
        return nn.Dense(3, name="head")(x.transpose(2, 1, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights",
    [
        slow(TensorSpec(bits=4, granularity="per_channel")),
        slow(TensorSpec(bits=8)),
        TensorSpec(bits=4, granularity="per_channel", symmetric=False),
    ],
)
def test_every_form_of_product(weights):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 8, 8, 3)), jnp.float32)
    model = Variants()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    rules = (QuantizationRule(path=".*", weights=weights, activations=TensorSpec(bits=8)),)
    integer, qparams = lowered(model, variables, x, rules)
    assert not integer.in_float
    ours, theirs = _both(integer, x)
    assert set(qparams) < set(ours)
    _equal(ours, theirs)


class Tokens(nn.Module):
    """A table that is looked up, a stack of layers, and a table that is multiplied with."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return embed.attend(stack(name="layers")(embed(tokens), None)[0])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(8, name="dense")(x)), None


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["per_tensor", slow("per_channel")])
def test_tables_and_stacks(granularity):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 11, (6, 5)), jnp.int32)
    model = Tokens()
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    weights = TensorSpec(bits=4, granularity=granularity)
    rules = (QuantizationRule(path=".*", weights=weights, activations=TensorSpec(bits=8)),)
    integer, _ = lowered(model, variables, tokens, rules)
    ours, theirs = _both(integer, tokens)
    assert {"layers/dense[0]", "layers/dense[1]", "layers/dense[2]"} < set(ours)
    _equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "stored", "count"),
    [
        (TensorSpec(bits=4, granularity="per_group", group_size=16), "INT4", 3),
        # with their zero points
        (TensorSpec(bits=4, granularity="per_group", group_size=16, symmetric=False), "INT4", 6),
        (TensorSpec(bits=2, granularity="per_channel"), "INT2", 2),  # 10 columns are INT4
        (TensorSpec(bits=8, granularity="per_channel"), "INT8", 6),  # with their zeros
        (TensorSpec(format="nf4", granularity="per_group", group_size=16), "UINT4", 3),
    ],
)
def test_weights_alone_are_stored_in_their_bits(weights, stored, count):
    model, variables, images = network("mlp")
    rules = (QuantizationRule(path=".*", weights=weights),)
    integer, _ = lowered(model, variables, images, rules)
    proto = deploy.to_onnx(integer, images)
    kinds = [onnx.TensorProto.DataType.Name(i.data_type) for i in proto.graph.initializer]
    assert kinds.count(stored) == count
    floats = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    assert sum(np.prod(i.dims) for i in floats) < 64 * 32  # fewer than the first layer's weights
    file, expected = proto.SerializeToString(), np.asarray(integer(images))
    run = lambda **options: deploy.onnx_session(file, **options).run(
        None, {"input": np.asarray(images)}
    )
    np.testing.assert_allclose(run(round_floats=False)[0], expected, atol=1e-5)
    # Its kernel for weights of few bits (MatMulNBits) makes 8 bits of the floats.
    error = np.abs(run()[0] - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.02 if weights.format == "" else error < 1e-5


def _has_vnni():
    return "vnni" in Path("/proc/cpuinfo").read_text()


@pytest.mark.skipif(_has_vnni(), reason="this CPU sums products of 8 bits in 32 bits")
def test_pairs_of_products_saturate_unless_told_otherwise():
    x = jnp.full((2, 64), 1.0).at[1].set(0.5)
    model = nn.Dense(8, use_bias=False)
    variables = {"params": {"kernel": jnp.ones((64, 8)).at[:, 1].set(-1.0)}}
    integer, _ = lowered(model, variables, x, quantize.uniform_rules(8, 8))
    file = deploy.to_onnx(integer, x).SerializeToString()
    run = lambda **options: deploy.onnx_session(file, **options).run(None, {"input": np.asarray(x)})
    np.testing.assert_array_equal(run()[0], integer(x))
    # 255 * 127 * 2 is more than 2^15.
    assert np.abs(run(exact=False)[0] - integer(x)).max() > 10


def _symmetric_rules(weights, activations):
    return (
        QuantizationRule(
            path=".*",
            weights=TensorSpec(bits=weights, granularity="per_channel"),
            activations=TensorSpec(bits=activations, signed=True),
        ),
    )


@pytest.mark.parametrize(
    ("name", "bits"), [slow("resnet", (8, 8)), slow("vit", (4, 8)), ("cnn", (8, 4))]
)
def test_symmetric_models_have_pairs_of_int8_around_0(name, bits):
    model, variables, images = network(name)
    integer, _ = lowered(model, variables, images, _symmetric_rules(*bits))
    proto = deploy.to_onnx(integer, images, symmetric=True)
    known = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    makers = {node.output[0]: node for node in proto.graph.node}
    pairs = 0
    for node in proto.graph.node:
        assert "Integer" not in node.op_type
        assert not node.op_type.startswith("QLinear")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = known[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
        if node.op_type in ("Conv", "MatMul"):
            # Nothing is between a weight and what multiplies it.
            pairs += makers[node.input[1]].op_type == "DequantizeLinear"
    layers = sum(
        bool(layer.grids) and not path.endswith(("/qk", "/av"))
        for path, layer in integer.static.layers
    )
    assert pairs >= layers
    session = deploy.onnx_session(proto.SerializeToString(), integer=False)
    (outputs,) = session.run(None, {"input": np.asarray(images)})
    np.testing.assert_allclose(outputs, integer(images), atol=1e-5)


def test_inputs_that_are_not_symmetric_are_an_error():
    model, variables, images = network("mlp")
    integer, _ = lowered(model, variables, images, quantize.uniform_rules(8, 8))
    with pytest.raises(ValueError, match=r"from 0 to 255: calibrate with .*signed=True"):
        deploy.to_onnx(integer, images, symmetric=True)


def test_fixed_point_multipliers_are_an_error():
    model, variables, images = network("mlp")
    qparams = quantize.calibrate(model, variables, quantize.uniform_rules(8, 8), [images])
    integer = deploy.lower(
        model, Weights(variables=variables, qparams=qparams), images, fixed_point=True
    )
    with pytest.raises(ValueError, match="lower without fixed_point"):
        deploy.to_onnx(integer, images)


@pytest.mark.slow
def test_a_layer_that_onnx_has_no_form_for_is_an_error():
    members = nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
        out_axes=1, axis_size=2,
    )  # fmt: skip
    x = jnp.ones((4, 3)).at[0].set(-1.0)
    model = members(5)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    integer, _ = lowered(model, variables, x, quantize.uniform_rules(8, 8))
    with pytest.raises(ValueError, match=r"nn\.vmap"):
        deploy.to_onnx(integer, x)


def test_an_operation_that_there_is_no_form_for_is_named():
    class Called(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(5)(x)
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return jax.pure_callback(np.sort, shape, x, vmap_method="expand_dims")

    x = np.ones((2, 4), np.float32)
    model = Called()
    integer = deploy.lower(
        model, Weights(variables=jax.jit(model.init)(jax.random.key(0), x), qparams={}), x
    )
    with pytest.raises(ValueError, match=r"^jax2onnx has no form for 'pure_callback': .*$"):
        deploy.to_onnx(integer, x)


def test_missing_files_and_libraries(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        deploy.onnx_session(tmp_path / "none.onnx")
    model, variables, images = network("mlp")
    integer, _ = lowered(model, variables, images, quantize.uniform_rules(8, 8))
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'kdq\[onnx\]'"):
        deploy.save_onnx(tmp_path / "model.onnx", integer, images)
    assert not list(tmp_path.iterdir())


def test_a_file_has_its_metadata(tmp_path):
    model, variables, images = network("mlp")
    integer, _ = lowered(model, variables, images, quantize.uniform_rules(4, 8))
    path = tmp_path / "model.onnx"
    size = deploy.save_onnx(path, integer, images, metadata={"arm": "student"})
    assert size == path.stat().st_size
    session = deploy.onnx_session(path)
    assert session.get_modelmeta().custom_metadata_map["arm"] == "student"
    np.testing.assert_array_equal(
        session.run(None, {"input": np.asarray(images)})[0], integer(images)
    )
