"""The optimizer against Optax written out by hand, and closed forms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdq import config
from kdq.train.optimizer import init_optimizer, make_optimizer, relative

STEPS, RATE = 12, 0.05


def trees(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "params": {"dense": {"kernel": draw(4, 3), "bias": draw(3)}},
        "scales": {
            "dense": {
                "weights": {"scale": jnp.exp(draw(1, 3))},
                "activations": {"scale": jnp.exp(draw())},
            }
        },
    }


def run(settings, trainable, gradients):
    optimizer = make_optimizer(settings)
    state = init_optimizer(settings, trainable, learning_rate=RATE, steps=STEPS)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return trainable


def cosine(warmup):
    """The documented rate: a linear ramp over the first share, a cosine to zero over all."""

    def rate(count):
        done = (count + 0.5) / STEPS
        ramp = jnp.clip(done / warmup, 0, 1) if warmup else 1.0
        return RATE * ramp * (1 + jnp.cos(math.pi * done)) / 2

    return rate


REFERENCES = {
    "adam": lambda rate: optax.adam(rate),
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_params_follow_plain_optax(name, warmup):
    settings = config.Optimizer(name=name, warmup=warmup)
    start, gradients = trees(0), [trees(1 + i) for i in range(STEPS)]
    got = run(settings, start, gradients)["params"]
    plain, expected = REFERENCES[name](cosine(warmup)), start["params"]
    state = plain.init(expected)
    for gradient in gradients:
        updates, state = plain.update(gradient["params"], state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
    moved = np.abs(got["dense"]["kernel"] - start["params"]["dense"]["kernel"])
    assert moved.min() > 1e-3


def test_weight_decay_is_decoupled_and_spares_vectors():
    settings = config.Optimizer(warmup=0.0, weight_decay=0.3)
    start = trees(0)
    zero = jax.tree.map(jnp.zeros_like, start)
    got = run(settings, start, [zero])
    rate = float(cosine(0.0)(0))
    kernel, bias = start["params"]["dense"]["kernel"], start["params"]["dense"]["bias"]
    np.testing.assert_allclose(got["params"]["dense"]["kernel"], (1 - rate * 0.3) * kernel, 1e-6)
    np.testing.assert_array_equal(got["params"]["dense"]["bias"], bias)
    jax.tree.map(np.testing.assert_array_equal, got["scales"], start["scales"])


def test_clipping_is_by_the_global_norm():
    """SGD's first step is 1.9 times the rate and the clipped gradient (Nesterov)."""
    settings = config.Optimizer(name="sgd", warmup=0.0, clip_norm=0.5)
    start, gradient = trees(0), trees(1)
    leaves = jax.tree.leaves(gradient)
    norm = math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in leaves))
    assert norm > 0.5
    got = run(settings, start, [gradient])["params"]["dense"]["kernel"]
    step = 1.9 * float(cosine(0.0)(0)) * 0.5 / norm * gradient["params"]["dense"]["kernel"]
    np.testing.assert_allclose(got, start["params"]["dense"]["kernel"] - step, rtol=1e-5)


def test_scales_move_relatively():
    """Adam's first step has the size of the rate: log(scale) moves by ∓rate, whatever its size."""
    settings = config.Optimizer(warmup=0.0, scale_rate=0.2)
    start, gradient = trees(0), trees(1)
    rate = 0.2 * float(cosine(0.0)(0))
    small = {**start, "scales": jax.tree.map(lambda s: 1e-4 * s, start["scales"])}
    for begin in (start, small):
        got = run(settings, begin, [gradient])["scales"]
        jax.tree.map(
            lambda new, old, g: np.testing.assert_allclose(
                new, old * np.exp(-rate * np.sign(g)), rtol=1e-5
            ),
            got,
            begin["scales"],
            gradient["scales"],
        )


def test_scales_stay_positive_where_a_plain_step_would_not():
    updates, params = jnp.array([-5.0, -8.0, 3.0]), jnp.array([1e-3, 2.0, 1e-3])
    got, _ = relative().update(updates, relative().init(params), params)
    expected = np.asarray(params, np.float64) * np.exp(np.asarray(updates, np.float64))
    np.testing.assert_allclose(params + got, expected, rtol=1e-3)
    assert (params + updates < 0)[:2].all()


def test_no_scales_is_no_obstacle():
    start = {"params": trees(0)["params"], "scales": {}}
    got = run(config.Optimizer(), start, [{"params": trees(1)["params"], "scales": {}}])
    assert got["scales"] == {}


def test_one_optimizer_serves_every_rate():
    """The compiled step is keyed by it; a new object for each arm would compile each arm."""
    settings = config.Optimizer()
    others = dataclasses.replace(settings, warmup=0.5, scale_rate=9.0, weight_decay=0.1)
    assert make_optimizer(settings) is make_optimizer(others)
    assert make_optimizer(settings) is not make_optimizer(config.Optimizer(clip_norm=1.0))


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(config.ConfigError, match=r"optimizer.*'adamm'.*'adam'.*valid: adam, sgd"):
        make_optimizer(config.Optimizer(name="adamm"))
