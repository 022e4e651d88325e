"""A model that kdq has never seen, as its author would write it: listed, trained, packed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kdq import config, quantize, tasks
from kdq.deploy import load_packed, save_packed
from kdq.quantize import QuantizationRule, TensorSpec
from kdq.quantize.network import Weights
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.step import train_step
from kdq.train.training import Training, create_state


class Block(nn.Module):
    """One of a stack of transformer blocks."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x))), None


class Unseen(nn.Module):
    """Tokens and an image in, as many logits as tokens out; every kind of layer."""

    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, tokens, images, train=False):
        embed = nn.Embed(11, 8, name="embed")
        x = embed(tokens)
        y = nn.Conv(8, (3, 3), name="stem", dtype=self.dtype)(images)
        y = nn.Conv(8, (3, 3), feature_group_count=2, kernel_dilation=2, name="grouped")(inputs=y)
        y = nn.Conv(8, (3, 3), feature_group_count=8, strides=2, name="depthwise")(y)
        y = nn.ConvTranspose(8, (2, 2), strides=(2, 2), name="transposed")(y)
        x = x + y.mean((1, 2))[:, None]
        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack(name="layers")(x, None)
        shared = nn.Dense(8, name="shared")
        x = shared(nn.relu(shared(x)))
        x = nn.DenseGeneral((2, 4), name="general")(x)
        x = nn.Einsum((2, 4, 8), "bthd,hdf->btf", name="einsum")(x).mean(1)
        members = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=1,
            axis_size=2,
        )
        x = members(8, name="members")(x).mean(1)
        gain = self.param("gain", nn.initializers.ones, (8,))
        return embed.attend(gain * x).astype(jnp.float32)


BATCH, TOKENS, HEADS, WIDTH = 4, 5, 2, 8
# Multiplications for one example, by hand.
MACS = {
    "embed": 8 * 11,  # attend; a lookup multiplies nothing
    "stem": 64 * 27 * 8,
    "grouped": 64 * 9 * 4 * 8,
    "depthwise": 16 * 9 * 8,
    "transposed": 16 * 4 * 8 * 8,
    "layers/attention/query": 3 * 5 * 8 * 8,
    "layers/attention/key": 3 * 5 * 8 * 8,
    "layers/attention/value": 3 * 5 * 8 * 8,
    "layers/attention/qk": 3 * 2 * 5 * 5 * 4,
    "layers/attention/av": 3 * 2 * 5 * 5 * 4,
    "layers/attention/out": 3 * 5 * 8 * 8,
    "layers/up": 3 * 5 * 8 * 16,
    "layers/down": 3 * 5 * 16 * 8,
    "shared": 2 * 5 * 8 * 8,
    "general": 5 * 8 * 8,
    "einsum": 5 * 8 * 8,
    "members": 2 * 8 * 8,
}


@pytest.fixture(scope="module")
def case():
    """`(model, variables, inputs)`."""
    rng = np.random.default_rng(0)
    inputs = (
        jnp.asarray(rng.integers(0, 11, (BATCH, TOKENS)), jnp.int32),
        jnp.asarray(rng.normal(size=(BATCH, 8, 8, 3)), jnp.float32),
    )
    model = Unseen()
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    return model, variables, inputs


def test_is_listed_with_what_can_not_be_quantized(case):
    layers = quantize.list_layers(*case)
    assert {path: layer.macs for path, layer in layers.items()} == MACS
    assert {p: one.stack for p, one in layers.items() if one.stack} == {
        p: (2,) if p == "members" else (3,) for p in MACS if p == "members" or "layers" in p
    }
    assert layers["layers/attention/qk"].operands == ("activations", "other")
    assert layers["layers/attention/query"].channel_axes == (-2, -1)
    others = quantize.list_unquantized(*case)
    assert sorted(others) == ["", "layers/LayerNorm_0"]
    assert "Unseen is no kind of layer that kdq knows; parameters ['gain']" in others[""]


class Stack(nn.Module):
    """The stack alone."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(name="layers")(x, None)[0]


def _one_by_one(variables, qparams, x):
    """`(what each layer's "up" gets, the output)` of the stack's layers, called in turn."""
    seen = []

    def watch(next_fun, args, kwargs, context):
        if context.method_name == "__call__" and context.module.name == "up":
            seen.append(np.abs(args[0]).max())
        return next_fun(*args, **kwargs)

    for i in range(3):
        params, own = (
            jax.tree.map(lambda p, i=i: p[i], tree)
            for tree in (variables["params"]["layers"], qparams)
        )
        own = {path.removeprefix("layers/"): quantizers for path, quantizers in own.items()}
        with nn.intercept_methods(watch):
            x, _ = quantize.apply(Block(), {"params": params}, own, (x, None))
    return seen, x


@pytest.mark.slow
def test_a_stack_is_calibrated_and_quantized_as_its_layers_one_by_one():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, TOKENS, WIDTH)), jnp.float32)
    variables = jax.jit(Stack().init)(jax.random.key(0), x)
    qparams = quantize.calibrate(Stack(), variables, quantize.uniform_rules(3, 4), [x])
    seen, _ = _one_by_one(variables, {}, x)
    quantizers = qparams["layers/up"]
    np.testing.assert_allclose(quantizers["activations"].scale, np.array(seen) / 7, rtol=1e-4)
    kernel = np.abs(np.asarray(variables["params"]["layers"]["up"]["kernel"]))
    np.testing.assert_allclose(
        quantizers["weights"].scale, kernel.max(1, keepdims=True) / 3, rtol=1e-6
    )
    expected = _one_by_one(variables, qparams, x)[1]
    found = quantize.apply(Stack(), variables, qparams, x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert float(jnp.abs(found - Stack().apply(variables, x)).max()) > 0.1


@pytest.mark.slow
def test_trains_with_quantizers_and_packs(case, tmp_path):
    model, variables, inputs = case
    qparams = quantize.calibrate(model, variables, quantize.uniform_rules(4, 8), [inputs])
    tokens, images = inputs
    batch = {"tokens": tokens, "image": images, "label": jnp.arange(BATCH, dtype=jnp.int32)}
    objective = Objective(task=tasks.build("classification", keys=("tokens", "image")))
    settings = config.Optimizer(warmup=0.0)
    weights = Weights(variables=variables, qparams=qparams)
    state = create_state(weights, settings, seed=0, steps=20, learning_rate=0.01)
    training = Training(network=model, optimizer=make_optimizer(settings), objective=objective)
    losses = []
    for _ in range(20):
        state, metrics = train_step(training, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]
    for path in ("layers/up", "layers/attention/qk", "members", "embed"):
        before, after = (jax.tree.leaves(q[path]) for q in (qparams, state.quantizers))
        assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True)), path
    simulated = quantize.apply(model, state.variables, state.quantizers, inputs)
    save_packed(
        tmp_path / "m",
        Weights(variables=state.variables, qparams=state.quantizers),
        model={"name": "Unseen"},
    )
    packed = load_packed(tmp_path / "m", model)
    np.testing.assert_allclose(packed(inputs), simulated, rtol=1e-4, atol=1e-5)
    arrays = safetensors.numpy.load_file(tmp_path / "m")
    for path, weights in (("layers/up/kernel", 3 * 8 * 16), ("embed/embedding", 11 * 8)):
        assert arrays[f"params/{path}"].nbytes == weights / 2  # four bits each


@pytest.mark.slow
def test_layers_that_rules_leave_out_are_bit_identical_to_float(case):
    model, variables, inputs = case
    rules = (
        QuantizationRule(path=r"layers/(up|down)", weights=TensorSpec(bits=2)),
        QuantizationRule(path="einsum", activations=TensorSpec(bits=2)),
    )
    qparams = quantize.calibrate(model, variables, rules, [inputs])
    assert list(qparams) == ["layers/up", "layers/down", "einsum"]
    rounded = quantize.simulate.quantize_params(variables["params"], qparams)
    for path in ("stem", "grouped", "shared", "embed", "general"):
        jax.tree.map(np.testing.assert_array_equal, rounded[path], variables["params"][path])
    seen = {}

    def watch(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        if context.method_name == "__call__":
            seen.setdefault("/".join(context.module.path), []).append(outputs)
        return outputs

    for apply in (
        lambda: model.apply(variables, *inputs),
        lambda: quantize.apply(model, variables, qparams, inputs),
    ):
        with nn.intercept_methods(watch):
            apply()
    for path in ("stem", "grouped", "depthwise", "transposed"):  # before anything quantized
        first, second = seen[path]
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(*seen["einsum"])


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_dynamic_ranges_need_no_calibration_data(case, granularity):
    """8 bits with the range of each tensor: close to float on data of another size."""
    model, variables, inputs = case
    spec = TensorSpec(bits=8, dynamic=True, granularity=granularity, symmetric=False)
    rules = (QuantizationRule(path=".*", activations=spec),)
    qparams = quantize.calibrate(model, variables, rules, [inputs])
    tokens, images = inputs
    larger = (tokens, 50 * images)
    expected = model.apply(variables, *larger)
    found = quantize.apply(model, variables, qparams, larger)
    spread = float(jnp.std(expected))
    assert float(jnp.abs(found - expected).max()) < 0.1 * spread
    static = (QuantizationRule(path=".*", activations=TensorSpec(bits=8)),)
    fixed = quantize.calibrate(model, variables, static, [inputs])
    clipped = quantize.apply(model, variables, fixed, larger)
    assert float(jnp.abs(clipped - expected).max()) > 0.5 * spread


@pytest.mark.slow
def test_bfloat16_compute_keeps_its_dtype(case):
    _, variables, inputs = case
    model = Unseen(dtype=jnp.bfloat16)
    qparams = quantize.calibrate(model, variables, quantize.uniform_rules(8, 8), [inputs])
    kinds = {}

    def watch(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        if context.module.name == "stem":
            kinds["stem"] = outputs.dtype
        return outputs

    with nn.intercept_methods(watch):
        found = quantize.apply(model, variables, qparams, inputs)
    assert kinds == {"stem": jnp.bfloat16}
    expected = model.apply(variables, *inputs)
    assert float(jnp.abs(found - expected).mean()) < 0.05 * float(jnp.std(expected))
