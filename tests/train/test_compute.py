"""Steps in parts, and activations computed twice: the same numbers as the plain step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import config, models, quantize
from kdq.quantize.network import Weights
from kdq.schema import AT_ONCE, Compute
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.step import rematerialized, train_step
from kdq.train.training import Training, create_state

SGD = config.Optimizer(name="sgd", scale_rule="sgd")


def batch(size=12, shape=(8, 8, 1)):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(size, *shape)).astype(np.float32)
    return {"image": images, "label": rng.integers(0, 5, size).astype(np.int32)}


def step(model, compute, *, bits=0, steps=3):
    """`(state, metrics of the last step)`."""
    given = batch()
    variables = model.init(jax.random.key(1), given["image"][:1], train=False)
    qparams = {}
    if bits:
        rules = quantize.uniform_rules(bits, bits)
        qparams = quantize.calibrate(model, variables, rules, [given["image"]])
    weights = Weights(variables=variables, qparams=qparams)
    state = create_state(weights, SGD, seed=3, steps=10, learning_rate=0.1)
    training = Training(
        network=model, optimizer=make_optimizer(SGD), objective=Objective(), compute=compute
    )
    for _ in range(steps):
        state, metrics = train_step(training, state, given)
    return state, metrics


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("parts", [3])
def test_a_batch_in_parts_is_the_batch(parts, bits):
    model = models.build("cnn", num_classes=5, widths=(4, 6))
    whole, metrics = step(model, AT_ONCE, bits=bits)
    cut, own = step(model, Compute(accumulate=parts), bits=bits)
    for ours, theirs in zip(
        jax.tree.leaves(cut.trainable), jax.tree.leaves(whole.trainable), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert own["correct"].count == metrics["correct"].count == 12
    for name in ("loss", "correct", "grad_norm"):
        np.testing.assert_allclose(own[name], metrics[name], rtol=1e-4)


@pytest.mark.slow
def test_batch_norm_sees_the_parts_one_after_another():
    """Its running mean after one step in two parts, by hand: every second example is a part."""
    model = models.build("cnn", num_classes=5, widths=(4,), batch_norm=True)
    state, _ = step(model, Compute(accumulate=2), steps=1)
    variables = model.init(jax.random.key(1), batch()["image"][:1], train=False)
    expected = variables["batch_stats"]
    for part in (batch()["image"][0::2], batch()["image"][1::2]):
        _, updates = model.apply(
            {"params": variables["params"], "batch_stats": expected},
            part,
            train=True,
            mutable=["batch_stats"],
        )
        expected = updates["batch_stats"]
    found = state.model_state["batch_stats"]["norm_0"]
    np.testing.assert_allclose(found["mean"], expected["norm_0"]["mean"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["var"], expected["norm_0"]["var"], rtol=1e-4)


RESNET = functools.partial(models.build, "resnet", num_classes=5, depth=8, widths=(4, 4, 4, 4))
VIT = functools.partial(models.build, "vit", num_classes=5, patch=4, width=8, depth=2, heads=2)
MODELS = {"resnet": (RESNET, r"stage_\d_block_\d"), "vit": (VIT, r"block_\d")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", pytest.param("vit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_rematerialized_gives_the_same(name, bits):
    build, pattern = MODELS[name]
    plain, metrics = step(build(), AT_ONCE, bits=bits, steps=2)
    again, own = step(build(), Compute(remat=pattern), bits=bits, steps=2)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(own["loss"], metrics["loss"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_rematerialized_keeps_less_for_the_backward_pass(name):
    build, pattern = MODELS[name]
    model, images = build(), jnp.asarray(batch()["image"])
    variables = model.init(jax.random.key(1), images[:1], train=False)

    def kept(pattern):
        def forward(params):
            with rematerialized(pattern):
                return quantize.apply(
                    model, {**variables, "params": params}, {}, images, train=True, mutable=True
                )[0]

        backward = jax.eval_shape(lambda params: jax.vjp(forward, params)[1], variables["params"])
        return sum(x.size for x in jax.tree.leaves(backward))

    assert kept(pattern) < 0.7 * kept("")
    assert kept("no_such_layer") == kept("")
