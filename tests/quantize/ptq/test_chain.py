"""Chains of methods: their order, what they refuse, and that a step sees the work of the first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import quantize
from kdq.config import ConfigError
from kdq.models import build
from kdq.quantize.ptq import chain
from kdq.quantize.ptq.awq import awq

RULES = quantize.uniform_rules(3, 8)


@pytest.fixture(scope="module")
def case():
    model = build("cnn", num_classes=3, widths=(4, 6), batch_norm=True)
    rng = np.random.default_rng(0)
    images = [jnp.asarray(rng.normal(size=(16, 6, 6, 1)), jnp.float32) for _ in range(2)]
    variables = jax.jit(model.init, static_argnames="train")(
        jax.random.key(0), images[0], train=False
    )
    noise = lambda x: x * jnp.asarray(np.exp(0.5 * rng.normal(size=x.shape)), x.dtype)
    variables = {**variables, "batch_stats": jax.tree.map(noise, variables["batch_stats"])}
    return model, variables, images


@pytest.mark.slow
def test_a_chain_is_its_methods_by_hand(case):
    """What comes later aims at the float model, folded, though the weights have been rounded."""
    model, variables, images = case
    options = {}
    steps = ({"method": "fold_batch_norm"}, {"method": "gptq"}, {"method": "bias_correction"})
    found = chain.run(steps, model, variables, RULES, images)
    folded, _ = chain.METHODS["fold_batch_norm"](model, variables, {}, images, **options)
    qparams = quantize.calibrate(model, folded, RULES, images)
    rounded, _ = chain.METHODS["gptq"](model, folded, qparams, images, **options)
    corrected, _ = chain.METHODS["bias_correction"](
        model, rounded, qparams, images, target=folded, **options
    )
    equal(found, (folded, corrected, qparams))
    # Each step moved something: the norm's factor into the kernel, the mean into the bias.
    np.testing.assert_allclose(found.variables["batch_stats"]["norm_1"]["var"], 1 - 1e-5, rtol=1e-6)
    moved = corrected["params"]["head"]["bias"] - variables["params"]["head"]["bias"]
    assert float(jnp.abs(moved).max()) > 1e-4
    logits = quantize.predict(model, folded, {}, images[0])
    np.testing.assert_allclose(logits, quantize.predict(model, variables, {}, images[0]), atol=1e-5)


def test_no_steps_only_calibrate(case):
    model, variables, images = case
    plain = chain.run((), model, variables, RULES, images)
    same = quantize.calibrate(model, variables, RULES, images)
    equal(plain, (variables, variables, same))


@pytest.mark.slow
def test_methods_get_the_rules_and_the_teacher(case):
    """AWQ searches for the bits of the rules; a teacher of constant logits flattens the model's."""
    model, variables, images = case
    flat = lambda inputs: jnp.zeros((len(inputs), 3))
    run = lambda steps, **more: chain.run(steps, model, variables, RULES, images, **more)
    scaled = awq(model, variables, {}, images, rules=RULES)[0]
    jax.tree.map(np.testing.assert_array_equal, run([{"method": "awq"}]).target, scaled)
    guided = [
        {
            "method": "teacher_guided",
            "rounding_steps": 0,
            "scale_steps": 300,
            "scale_learning_rate": 1e-2,
        }
    ]
    spread = [
        float(quantize.predict(model, r.variables, r.qparams, images[0]).std(-1).mean())
        for r in (run(guided), run(guided, teacher=flat))
    ]
    assert spread[1] < 0.7 * spread[0]


def equal(found, expected):
    target, variables, qparams = expected
    for one, other in (
        (found.target, target),
        (found.variables, variables),
        (found.qparams, qparams),
    ):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"method": "bias"}], r"unknown ptq.x\[0\].method: 'bias'.*bias_correction"),
        ([{"methd": "reestimate"}], r"unknown ptq.x\[0\].method: None"),
        (
            [{"method": "reestimate"}, {"method": "fold_batch_norm"}],
            r"ptq.x\[1\]: 'fold_batch_norm' changes float weights and must come before",
        ),
        ([{"method": "reestimate", "steps": 3}], r"unknown key in ptq.x\[0\]: 'steps'"),
        ([{"method": "reestimate", "batches": 3}], r"ptq.x\[0\].batches: not an option"),
    ],
)
def test_what_a_chain_refuses(steps, message):
    with pytest.raises(ConfigError, match=message):
        chain.check(steps, "ptq.x")
