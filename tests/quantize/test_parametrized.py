"""Layers whose weight is computed: they stay in float with the reason, on every path."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import deploy, quantize
from kdq.quantize import QuantizationRule, TensorSpec
from kdq.quantize.network import Weights

X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
RULES = quantize.uniform_rules(8, 8)


def standardized(tree):
    """Kernels of mean 0 and standard deviation 1, in each output channel."""
    change = lambda path, w: (
        (w - w.mean(0)) / w.std(0) if path[-1] == jax.tree_util.DictKey("kernel") else w
    )
    return jax.tree_util.tree_map_with_path(change, tree)


class Standardized(nn.Dense):
    """The usual idiom: the parameter is changed where it is asked for."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return (value - value.mean(0)) / value.std(0) if name == "kernel" else value


class Scaled(nn.Dense):
    """Multiplies by twice its kernel."""

    @nn.compact
    def __call__(self, inputs):
        shape = (inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        return inputs @ (2 * jnp.abs(kernel)) + self.param("bias", self.bias_init, shape[1:])


class Net(nn.Module):
    """A hidden layer in one of many wrappers, and a plain head."""

    kind: str

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        dense = lambda: nn.Dense(8, name="hidden")
        if self.kind == "weight norm":
            x = nn.WeightNorm(dense(), name="wrapper")(x)
        elif self.kind == "spectral norm":
            x = nn.SpectralNorm(dense(), name="wrapper")(x, update_stats=False)
        elif self.kind == "map_variables":
            call = lambda module, x: module(x)
            x = nn.map_variables(call, "params", standardized, init=self.is_initializing())(
                dense(), x
            )
        elif self.kind == "cast":
            cast = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
            call = lambda module, x: module(x)
            x = nn.map_variables(call, "params", cast, init=self.is_initializing())(dense(), x)
        elif self.kind == "param":
            x = Standardized(8, name="hidden")(x)
        elif self.kind == "call":
            x = Scaled(8, name="hidden")(x)
        else:
            x = nn.Dense(8, name="hidden", dot_general=self._multiply)(x)
        return nn.Dense(3, name="head")(nn.relu(x))

    def _multiply(self, x, kernel, *args, **kwargs):
        return jax.lax.dot_general(x, jnp.tanh(kernel), *args, **kwargs)


def weight(kind, variables):
    """What the hidden layer multiplies by, in NumPy."""
    params = jax.tree.map(np.float64, variables["params"])
    kernel = params["hidden"]["kernel"]
    if kind == "weight norm":
        (gain,) = params["wrapper"].values()
        return gain * kernel / np.linalg.norm(kernel, axis=0)
    if kind == "spectral norm":
        (u,) = (v for k, v in variables["batch_stats"]["wrapper"].items() if k.endswith("/u"))
        unit = lambda v: v / np.linalg.norm(v)
        v = unit(np.float64(u) @ kernel.T)  # one power iteration
        return kernel / (v @ kernel @ unit(v @ kernel).T)
    if kind in ("map_variables", "param"):
        return (kernel - kernel.mean(0)) / kernel.std(0)
    if kind == "cast":
        return np.float64(jnp.asarray(kernel, jnp.bfloat16))
    return 2 * np.abs(kernel) if kind == "call" else np.tanh(kernel)


KINDS = ["weight norm", "spectral norm", "map_variables", "cast", "param", "call", "dot_general"]


def network(kind):
    """`(model, variables, expected)`: parameters far from what their wrapper makes of them."""
    model = Net(kind)
    variables = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0), X))
    variables["params"]["hidden"]["kernel"] = 3 * variables["params"]["hidden"]["kernel"] + 0.5
    if kind == "weight norm":
        gain = variables["params"]["wrapper"]
        gain |= {name: 2 + np.arange(8, dtype=np.float32) / 8 for name in gain}
    params = jax.tree.map(np.float64, variables["params"])
    hidden = np.maximum(X @ weight(kind, variables) + params["hidden"]["bias"], 0)
    return model, variables, hidden @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_computed_weight_stays_in_float_wherever_the_model_goes(kind, tmp_path):
    model, variables, expected = network(kind)
    bound = (0.05 if kind == "cast" else 0.03) * np.abs(expected).max()
    assert list(quantize.list_layers(model, variables, X)) == ["head"]
    assert "kernel" in quantize.list_unquantized(model, variables, X)["hidden"]
    qparams = quantize.calibrate(model, variables, RULES, [X])
    assert list(qparams) == ["head"]
    integer = deploy.lower(model, Weights(variables=variables, qparams=qparams), X)
    assert set(integer.in_float) >= {"hidden"}
    trained = quantize.prepare(variables, qparams, "lsq")
    outputs = {
        "simulated": quantize.apply(model, variables, qparams, X),
        "trained": quantize.apply(model, *trained, X),
        "integer": integer(X),
    }
    deploy.save_packed(
        tmp_path / "file",
        Weights(variables=variables, qparams=qparams),
        model={"name": "somebody's"},
    )
    packed = deploy.load_packed(tmp_path / "file", model)
    outputs |= {"packed": packed(X), "packed, lowered": packed.lower(X)(X)}
    for name, array in outputs.items():
        assert np.abs(np.asarray(array) - expected).max() < bound, name
    same = quantize.apply(model, integer.simulated(variables), qparams, X)
    np.testing.assert_allclose(integer(X), same, atol=1e-4 * np.abs(expected).max())


def test_the_reason_names_what_the_weight_is_made_of():
    model, variables, _ = network("weight norm")
    reason = quantize.list_unquantized(model, variables, X)["hidden"]
    for name in variables["params"]["wrapper"]:
        assert f"params/wrapper/{name}" in reason
    assert "params/hidden/kernel" in reason
    model, variables, _ = network("param")
    reason = quantize.list_unquantized(model, variables, X)["hidden"]
    assert "Standardized changes its kernel" in reason


def test_a_rule_for_such_a_layer_and_quantizers_of_an_old_file_are_refused_with_the_reason():
    model, variables, _ = network("weight norm")
    rule = QuantizationRule(path="hidden", weights=TensorSpec(bits=8))
    with pytest.raises(ValueError, match=re.escape("out of reach: {'hidden': 'the kernel that")):
        quantize.calibrate(model, variables, (rule,), [X])
    plain = quantize.calibrate(model, variables, RULES, [X])
    with pytest.raises(ValueError, match=r"'hidden', which must stay in float: .*; calibrate anew"):
        deploy.lower(model, Weights(variables=variables, qparams={"hidden": plain["head"]}), X)


def test_what_is_beside_a_computed_weight_in_one_wrapper_stays_in_float_too():
    """The transform fails for all but arrays in dicts: the lookup can't have quantizers there."""

    def transform(tree):
        change = lambda path, a: 2 * a if path[-1].key == "kernel" else a
        return jax.tree_util.tree_map_with_path(change, tree)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(5, 6, name="embed")
            x = nn.Dense(6, name="dense")(embed(tokens))
            return embed.attend(x)

    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            call = lambda module, x: module(x)
            wrapped = nn.map_variables(call, "params", transform, init=self.is_initializing())
            return nn.Dense(2, name="head")(wrapped(Block(name="block"), tokens))

    tokens = np.arange(10).reshape(2, 5) % 5
    variables = jax.jit(Wrapped().init)(jax.random.key(0), tokens)
    assert list(quantize.list_layers(Wrapped(), variables, tokens)) == ["head"]
    reasons = quantize.list_unquantized(Wrapped(), variables, tokens)
    assert {"block/dense", "block/embed"} <= set(reasons)
    qparams = quantize.calibrate(Wrapped(), variables, RULES, [tokens])
    expected = np.asarray(Wrapped().apply(variables, tokens))
    outputs = np.asarray(quantize.apply(Wrapped(), variables, qparams, tokens))
    assert np.abs(outputs - expected).max() < 0.03 * np.abs(expected).max()


def test_a_subclass_that_multiplies_by_its_kernel_is_a_layer_as_before():
    class LowRank(nn.Dense):
        """Adds a product of two thin matrices of its own."""

        @nn.compact
        def __call__(self, inputs):
            y = nn.Dense.__call__.__wrapped__(self, inputs)
            down = self.param("down", self.kernel_init, (inputs.shape[-1], 1))
            return y + inputs @ down @ self.param("up", self.kernel_init, (1, self.features))

    model = LowRank(3)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    assert list(quantize.list_layers(model, variables, X)) == [""]
    qparams = quantize.calibrate(model, variables, RULES, [X])
    integer = deploy.lower(model, Weights(variables=variables, qparams=qparams), X)
    assert integer.in_float == {"": "it also computes with ['down', 'up']"}
    expected = np.asarray(model.apply(variables, X))
    assert np.abs(np.asarray(integer(X)) - expected).max() < 0.03 * np.abs(expected).max()
