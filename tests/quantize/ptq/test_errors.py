"""The error report against SQNR and KL written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import rel_entr, softmax

from kdq.quantize import apply, calibrate, uniform_rules
from kdq.quantize.ptq.errors import LayerErrors, layer_errors


class Net(nn.Module):
    """The layers run in another order than that of their names; one runs twice."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(4, name="z")
        x = nn.relu(shared(nn.relu(shared(x))))
        return nn.Dense(3, name="a")(x[:, :2].reshape(-1, 2))


def _variables(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "params": {
            "a": {"kernel": draw(2, 3), "bias": draw(3)},
            "z": {"kernel": draw(4, 4), "bias": draw(4)},
        }
    }


def _batches(n=3):
    rng = np.random.default_rng(1)
    return [jnp.asarray((k + 1) * rng.normal(size=(6, 4)), jnp.float32) for k in range(n)]


def _forward(params, x, bits=None, qparams=None):
    """Outputs of the layers by hand: z, z again, a; float64."""

    def layer(x, name):
        kernel, bias = (np.float64(params[name][k]) for k in ("kernel", "bias"))
        if qparams:
            x, kernel = (
                _round(v, qparams[name][k]) for v, k in ((x, "activations"), (kernel, "weights"))
            )
        return x @ kernel + bias

    first = layer(np.float64(x), "z")
    second = layer(np.maximum(first, 0), "z")
    return first, second, layer(np.maximum(second, 0)[:, :2], "a")


def _round(x, q):
    scale, low, high = (np.asarray(getattr(q, k), np.float64) for k in ("scale", "qmin", "qmax"))
    return np.clip(np.round(x / scale), low, high) * scale


def test_both_columns_by_hand():
    model, batches, variables = Net(), _batches(), _variables()
    moved = jax.tree.map(lambda v: 1.1 * v, variables)
    models = [
        (v, calibrate(model, v, uniform_rules(bits, 8), batches))
        for v, bits in ((variables, 3), (moved, 6))
    ]
    report = layer_errors(model, variables, *models, batches)
    assert list(report.sqnr) == ["z", "a"]
    clean = [_forward(variables["params"], x) for x in batches]
    for column, (v, q) in enumerate(models):
        noisy = [_forward(v["params"], x, qparams=q) for x in batches]
        for name, places in (("z", (0, 1)), ("a", (2,))):
            pairs = [(c[i], n[i]) for c, n in zip(clean, noisy, strict=True) for i in places]
            signal = sum(np.square(c).sum() for c, _ in pairs)
            noise = sum(np.square(c - n).sum() for c, n in pairs)
            expected = 10 * np.log10(signal / noise)
            assert report.sqnr[name][column] == pytest.approx(expected, abs=1e-3)
        p, q_ = (softmax(np.concatenate([s[2] for s in side]), -1) for side in (clean, noisy))
        assert report.kl[column] == pytest.approx(rel_entr(p, q_).sum(-1).mean(), rel=1e-3)


@pytest.mark.slow
def test_a_stack_has_a_row_for_each_of_its_layers_and_products_have_one():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.MultiHeadDotProductAttention(1, name="attn")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0}
            stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2)
            return stack(name="layers")(x, None)[0], x

    model = Scanned()
    x = jax.random.normal(jax.random.key(0), (3, 4, 2))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    qparams = calibrate(model, variables, uniform_rules(4, 4), [x])
    only = {"layers/attn/qk": qparams["layers/attn/qk"]}
    report = layer_errors(model, variables, (variables, qparams), (variables, only), [x])
    assert list(report.sqnr)[-2:] == ["layers/attn/out[0]", "layers/attn/out[1]"]
    assert {"layers/attn/qk[0]", "layers/attn/av[1]"} <= set(report.sqnr)
    # Before the first product there is no error; from there on there is.
    exact = [path for path, (_, after) in report.sqnr.items() if after == np.inf]
    assert exact == [f"layers/attn/{k}[0]" for k in ("query", "key", "value")]
    assert all(0 < before < 60 for before, _ in report.sqnr.values())
    # The prediction of a tuple is its first array.
    clean, noisy = (
        softmax(np.float64(apply(model, variables, q, x)[0]), -1) for q in ({}, qparams)
    )
    assert report.kl[0] == pytest.approx(rel_entr(clean, noisy).sum(-1).mean(), rel=1e-4)


def test_outputs_without_a_prediction_have_no_divergence():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"boxes": nn.Dense(4)(x), "scores": nn.Dense(3)(x)}

    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    variables = jax.jit(Two().init)(jax.random.key(0), x)
    pair = (variables, calibrate(Two(), variables, uniform_rules(4, 4), [x], check=False))
    report = layer_errors(Two(), variables, pair, pair, [x])
    assert report.kl is None
    assert "not one array of logits" in str(report)


def test_the_table():
    report = LayerErrors(sqnr={"conv": (10.0, 12.345), "": (np.inf, np.inf)}, kl=(0.5, 0.25))
    assert str(report).splitlines() == [
        "layer  SQNR before  after  gain [dB]",
        "conv         10.00  12.35      +2.35",
        '""             inf    inf',
        "KL(float || quantized): 5.000e-01 before, 2.500e-01 after",
    ]


def test_bad_data_is_refused():
    model, batches, variables = Net(), _batches(), _variables()
    same = (variables, {})
    with pytest.raises(ValueError, match="layer_errors got no batches"):
        layer_errors(model, variables, same, same, [])
    batches[1] = batches[1].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="NaN or infinity in the output of layer 'z'"):
        layer_errors(model, variables, same, same, batches)
