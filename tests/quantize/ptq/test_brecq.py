"""BRECQ and QDrop against every possible rounding of a small block and closed-form gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdq.quantize import Quantizer, apply, fake_quantize
from kdq.quantize.inputs import Inputs
from kdq.quantize.network import Network
from kdq.quantize.ptq import brecq as module
from kdq.quantize.ptq.brecq import brecq, dropping, matching, smallest
from kdq.quantize.ptq.units import Watch, describe


def _quantizer(weight, bits, stack=(), part=0.8):
    """Symmetric, a scale for each output; made without compiling anything."""
    axes = tuple(range(len(stack), weight.ndim - 1))
    reach = part * np.abs(weight).max(axes, keepdims=True)
    top = 2.0 ** (bits - 1)
    return Quantizer(
        scale=jnp.asarray(reach / (top - 0.5), jnp.float32),
        zero_point=jnp.asarray(np.zeros(reach.shape, np.float32)),
        qmin=jnp.asarray(np.full(stack, -top, np.float32)),
        qmax=jnp.asarray(np.full(stack, top - 1, np.float32)),
    )


def _inputs(scale, bits=4):
    return Quantizer(*map(jnp.float32, (scale, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)))


def _draw(model, *inputs, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, jnp.float32), shapes)


def _mse(a, b):
    return np.mean((np.float64(a) - np.float64(b)) ** 2)


def _inputs_of(rows, width, seed=0):
    """Correlated: a few directions have most of the variance."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) * np.exp(-np.arange(width))[:, None]
    return jnp.asarray(rng.normal(size=(rows, width)) @ mix, jnp.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.relu(nn.Dense(3, name="up", use_bias=False)(x))
        return x + nn.Dense(2, name="down", use_bias=False)(h), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = Block(name="block")(x)
        return nn.Dense(3, name="head")(x)


PATHS = ("block/up", "block/down", "head")


def _net():
    x = _inputs_of(64, 2, seed=1)
    variables = _draw(Net(), x, seed=1)
    return (
        x,
        variables,
        {p: {"weights": _quantizer(np.asarray(_at(variables["params"], p)), 3)} for p in PATHS},
    )


def _at(params, path):
    for name in path.split("/"):
        params = params[name]
    return params["kernel"]


@pytest.mark.slow
def test_a_block_is_close_to_the_best_of_all_its_roundings():
    x, variables, qparams = _net()
    rounded, same = brecq(Net(), variables, qparams, [x[:32], x[32:]], steps=600)
    assert same.keys() == qparams.keys()
    z = np.float64(x)

    def block(up, down):
        return z + np.maximum(z @ np.float64(up), 0) @ np.float64(down)

    up, down = (_at(variables["params"], f"block/{n}") for n in ("up", "down"))
    wanted = block(up, down)
    options = []
    for name, weight in (("up", up), ("down", down)):
        q = qparams[f"block/{name}"]["weights"]
        scale = np.float64(q.scale)
        below = np.floor(np.float64(weight) / scale)
        clip = lambda codes, q=q: np.clip(codes, float(q.qmin), float(q.qmax))
        flips = itertools.product((0, 1), repeat=weight.size)
        options.append([clip(below + np.reshape(f, weight.shape)) * scale for f in flips])
    errors = np.sort([_mse(block(a, b), wanted) for a, b in itertools.product(*options)])
    learned, nearest = (
        _mse(block(*(_at(p, f"block/{n}") for n in ("up", "down"))), wanted)
        for p in (
            rounded["params"],
            {
                "block": {
                    n: {"kernel": fake_quantize(w, qparams[f"block/{n}"]["weights"])}
                    for n, w in (("up", up), ("down", down))
                }
            },
        )
    )
    assert nearest > 2 * errors[0]
    assert learned <= errors[8] * 1.001  # of 4096
    for path in PATHS:
        kernel = _at(rounded["params"], path)
        np.testing.assert_array_equal(fake_quantize(kernel, qparams[path]["weights"]), kernel)


def test_which_modules_are_blocks():
    layers = ["stem", "a/x", "a/y", "b/c/q", "b/c/k", "b/d", "e/only", "head"]
    assert smallest(layers) == ["a", "b/c"]
    assert smallest(["x", "y"]) == []  # never the whole model
    paths = ["", "a", "a/x", "b", "b/c"]
    assert matching(("a", "b"), paths) == ["a", "b"]
    with pytest.raises(ValueError, match=r"pattern 'z.\*' matches no module.*'b/c'"):
        matching(("a", "z.*"), paths)
    with pytest.raises(ValueError, match="block 'b/c' is inside of block 'b'"):
        matching(("b.*",), paths)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, length=2, **axes)(name="layers")(x, None)
        return x


@pytest.mark.slow
def test_qdrop_in_a_stack_learns_rounding_and_scales():
    x = _inputs_of(64, 2)
    variables = _draw(Stack(), x)
    params = variables["params"]["layers"]
    both = jax.tree.map(lambda a: jnp.stack([a, a]), _inputs(1.0))
    qparams = {
        f"layers/{n}": {
            "weights": _quantizer(np.asarray(params[n]["kernel"]), 3, stack=(2,)),
            "activations": both,
        }
        for n in ("up", "down")
    }
    options = {"steps": 300, "drop": 0.5, "scale_learning_rate": 1e-2}
    rounded, trained = brecq(Stack(), variables, qparams, [x], **options)
    moved = [np.asarray(trained[p]["activations"].scale) for p in trained]
    assert all((m > 0).all() and (m != 1).all() and m[0] != m[1] for m in moved)
    wanted = Stack().apply(variables, x)
    nearest = _mse(apply(Stack(), variables, qparams, x), wanted)
    assert _mse(apply(Stack(), rounded, trained, x), wanted) < nearest / 1.5
    for p in trained:
        np.testing.assert_array_equal(trained[p]["weights"].scale, qparams[p]["weights"].scale)


class Identity(nn.Module):
    """Two layers in a stack that return what they get, quantized."""

    @nn.compact
    def __call__(self, x):
        class One(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x, nn.Dense(2, use_bias=False, name="layer")(x)

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(One, length=2, **axes)(name="layers")(x, None)[1]


def test_each_element_stays_float_with_the_probability_of_drop():
    x = jnp.full((2000, 2), 0.4)  # rounds to 0
    variables = {"params": {"layers": {"layer": {"kernel": jnp.stack([jnp.eye(2)] * 2)}}}}
    both = jax.tree.map(lambda a: jnp.stack([a, a]), _inputs(1.0))
    qparams = {"layers/layer": {"activations": both}}
    kept = dropping(Identity(), variables, qparams, (x,), jax.random.key(0), 0.3)
    kept = np.asarray(kept).reshape(2, -1)
    assert set(np.unique(kept)) == {0, np.float32(0.4)}
    share = (kept > 0).mean(1)
    np.testing.assert_allclose(share, 0.3, atol=0.03)  # 4000 draws: 4 standard deviations
    # Layers of a stack draw independently of each other.
    assert np.mean((kept[0] > 0) & (kept[1] > 0)) == pytest.approx(0.09, abs=0.02)


def test_fisher_weights_are_the_squared_gradient_of_kl_at_the_blocks_output():
    x, variables, qparams = _net()
    paths = ("", "block", *PATHS)
    units = describe(Network(Net()), variables, Inputs(x), paths, qparams)
    block = units["block"]
    watch = Watch(Network(Net()), ("block",), [Inputs(x[:32]), Inputs(x[32:])])
    (found,) = module._importance(watch, variables, [block], variables, qparams, block, ())[0]

    # The block is rounded to nearest and the head float: dKL/dz = (softmax(z W + b) - p) Wᵀ.
    params, z = variables["params"], np.float64(x)
    up, down = (np.float64(fake_quantize(_at(params, p), qparams[p]["weights"])) for p in PATHS[:2])
    exact = [np.float64(_at(params, p)) for p in PATHS]
    bias = np.float64(params["head"]["bias"])

    def softmax(a, b):
        logits = (z + np.maximum(z @ a, 0) @ b) @ exact[2] + bias
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        return shifted / shifted.sum(1, keepdims=True)

    gradient = (softmax(up, down) - softmax(*exact[:2])) @ exact[2].T
    expected = gradient**2 / np.mean(gradient**2)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_fisher_weights_serve_the_logits():
    """Where one output of the block does not reach the logits, the rounding cares for the other."""
    x, variables, qparams = _net()
    blind = variables["params"]["head"]["kernel"].at[1].set(0.0)
    head = variables["params"]["head"] | {"kernel": blind}
    variables = {"params": variables["params"] | {"head": head}}
    only = {p: qparams[p] for p in PATHS[:2]}
    wanted = Net().apply(variables, x)
    errors = []
    for fisher in (False, True):
        rounded, _ = brecq(Net(), variables, only, [x], steps=400, fisher=fisher)
        errors.append(_mse(Net().apply(rounded, x), wanted))
    assert errors[1] <= errors[0]
    assert errors[1] < _mse(apply(Net(), variables, only, x), wanted)


def test_bad_options():
    x, variables, qparams = _net()
    with pytest.raises(ValueError, match=r"drop=1\.0: expected at least 0 and less than 1"):
        brecq(Net(), variables, qparams, [x], drop=1.0)
    with pytest.raises(ValueError, match="brecq got no batches"):
        brecq(Net(), variables, qparams, [])
    with pytest.raises(ValueError, match="pattern 'blocks' matches no module"):
        brecq(Net(), variables, qparams, [x], blocks=("blocks",))
