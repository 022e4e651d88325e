"""Teacher-guided calibration against grid searches in float64, and its promise never to harm."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdq.quantize import Quantizer, fake_quantize
from kdq.quantize.ptq.teacher_guided import teacher_guided

MODEL = nn.Dense(3, use_bias=False)


def _setup(bits=2, scale=1.0, batches=4):
    """Four times the same inputs, so that what is held out is what is fitted."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    half = 2 ** (bits - 1)
    quantizer = Quantizer(*map(jnp.float32, (scale, 0, -half, half - 1)))
    return [x] * batches, {"params": {"kernel": kernel}}, {"": {"weights": quantizer}}


def _kl(logits, wanted):
    log = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))
    p, q = (log(np.float64(z)) for z in (wanted, logits))
    return (np.exp(p) * (p - q)).sum(-1).mean()


def _logits(batches, variables):
    return np.float64(batches[0]) @ np.float64(variables["params"]["kernel"])


def test_the_scale_is_that_of_a_grid_search():
    batches, variables, qparams = _setup()
    before = jax.tree.map(np.array, (variables, qparams))
    found, trained = teacher_guided(
        MODEL, variables, qparams, batches, scale_steps=300, rounding_steps=0, temperature=1.0
    )
    jax.tree.map(np.testing.assert_array_equal, before, (variables, qparams))
    kernel, wanted = np.float64(variables["params"]["kernel"]), _logits(batches, variables)
    error = lambda s: _kl(
        np.float64(batches[0]) @ (np.clip(np.round(kernel / s), -2, 1) * s), wanted
    )
    reached = _kl(_logits(batches, found), wanted)
    assert reached < 0.8 * error(1.0)
    # Straight-through gradients find a minimum near where they start, not that of all scales.
    assert reached <= 1.05 * min(error(s) for s in np.geomspace(0.7, 1.4, 300))
    quantizer = trained[""]["weights"]
    kernel = found["params"]["kernel"]
    np.testing.assert_array_equal(fake_quantize(kernel, quantizer), kernel)
    assert reached == pytest.approx(error(float(quantizer.scale)), rel=1e-3)


def test_the_rounding_is_close_to_the_best_of_all():
    batches, variables, qparams = _setup(bits=3, scale=0.7)
    found, trained = teacher_guided(MODEL, variables, qparams, batches, scale_learning_rate=0.0)
    assert trained[""]["weights"].scale == np.float32(0.7)
    kernel, wanted = np.float64(variables["params"]["kernel"]), _logits(batches, variables)
    below = np.floor(kernel / 0.7)
    errors = []
    for up in itertools.product((0, 1), repeat=9):
        codes = np.clip(below + np.reshape(up, (3, 3)), -4, 3)
        errors.append(_kl(np.float64(batches[0]) @ (codes * 0.7), wanted))
    reached = _kl(_logits(batches, found), wanted)
    nearest = _kl(np.float64(batches[0]) @ (np.clip(np.round(kernel / 0.7), -4, 3) * 0.7), wanted)
    assert reached < 0.7 * nearest
    assert reached <= np.sort(errors)[3] * 1.001  # of 512


def test_a_teacher_of_ones_own_and_what_softmax_does_not_see():
    batches, variables, qparams = _setup(bits=3, scale=0.5)
    teacher = lambda x: 2.0 * x @ variables["params"]["kernel"][::-1]
    shifted = lambda x: teacher(x) + 8.0
    options = {"scale_steps": 60, "rounding_steps": 60}
    found, other = (
        teacher_guided(MODEL, variables, qparams, batches, teacher=t, temperature=1.0, **options)[0]
        for t in (teacher, shifted)
    )
    wanted = teacher(batches[0])
    nearest = fake_quantize(variables["params"]["kernel"], qparams[""]["weights"])
    before = _kl(_logits(batches, {"params": {"kernel": nearest}}), wanted)
    assert _kl(_logits(batches, found), wanted) < 0.9 * before
    np.testing.assert_allclose(
        found["params"]["kernel"], other["params"]["kernel"], rtol=1e-2, atol=1e-3
    )


def test_it_never_returns_worse_than_it_started_from():
    batches, variables, qparams = _setup(bits=4, scale=0.3)
    found, trained = teacher_guided(
        MODEL,
        variables,
        qparams,
        batches,
        temperature=1.0,
        scale_learning_rate=30.0,
        learning_rate=1e4,
        scale_steps=7,
        rounding_steps=7,
    )
    nearest = fake_quantize(variables["params"]["kernel"], qparams[""]["weights"])
    wanted = _logits(batches, variables)
    before = _kl(_logits(batches, {"params": {"kernel": nearest}}), wanted)
    assert _kl(_logits(batches, found), wanted) <= before * (1 + 1e-6)
    assert np.isfinite(trained[""]["weights"].scale)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(3, name="layer")(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        assert not train
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Body, length=2, **axes)(name="layers")(x, None)[0]


@pytest.mark.slow
def test_a_stack_with_quantized_activations():
    batches, _, _ = _setup()
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    variables = {"params": {"layers": {"layer": {"kernel": draw(2, 3, 3), "bias": draw(2, 3)}}}}
    two = lambda *values: Quantizer(*(jnp.full(2, v, jnp.float32) for v in values))
    weights = two(0.8, 0, -4, 3).replace(
        scale=jnp.full((2, 1, 3), 0.8), zero_point=jnp.zeros((2, 1, 3))
    )
    qparams = {"layers/layer": {"weights": weights, "activations": two(0.9, 0, -4, 3)}}
    found, trained = teacher_guided(Stack(), variables, qparams, batches)
    own = trained["layers/layer"]
    scales = np.asarray(own["activations"].scale)
    assert scales[0] != scales[1]
    assert (scales != np.float32(0.9)).all()
    layer = found["params"]["layers"]["layer"]
    np.testing.assert_array_equal(fake_quantize(layer["kernel"], own["weights"]), layer["kernel"])

    def run(params, quantizers):
        x = np.float64(batches[0])
        for i in range(2):
            h = x
            if quantizers is not None:
                s = np.float64(quantizers["activations"].scale[i])
                h = np.clip(np.round(x / s), -4, 3) * s
            kernel, bias = (np.float64(params["layers"]["layer"][k][i]) for k in ("kernel", "bias"))
            x = x + np.maximum(h @ kernel + bias, 0)
        return x

    old = variables["params"]["layers"]["layer"]
    nearest = old | {"kernel": fake_quantize(old["kernel"], weights)}
    wanted = run(variables["params"], None)
    before = _kl(run({"layers": {"layer": nearest}}, qparams["layers/layer"]), wanted)
    assert _kl(run(found["params"], own), wanted) < 0.6 * before


def test_bad_input():
    batches, variables, qparams = _setup()
    go = lambda batches, **kwargs: teacher_guided(MODEL, variables, qparams, batches, **kwargs)
    with pytest.raises(ValueError, match="got no batches"):
        go([])
    with pytest.raises(ValueError, match="expected 2 or more, a quarter of which is held out"):
        go(batches[:1])
    with pytest.raises(ValueError, match=r"have shape \(32, 2\), the model's have \(32, 3\)"):
        go(batches, teacher=lambda x: x[:, :2])
    with pytest.raises(ValueError, match="the teacher's logits are not finite"):
        go([b.at[0, 0].set(jnp.nan) for b in batches])
