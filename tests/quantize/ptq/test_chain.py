"""Chains of methods: their order, what they refuse, and that a step sees the work of the first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import quantize
from kdq.config import ConfigError
from kdq.models import build
from kdq.quantize.ptq import chain

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


def test_a_chain_is_its_methods_by_hand(case):
    model, variables, images = case
    steps = ({"method": "fold_batch_norm"}, {"method": "bias_correction"})
    found = chain.run(steps, model, variables, RULES, images, apply_kwargs={"train": False})
    apply_kwargs = {"train": False}
    folded, _ = chain.METHODS["fold_batch_norm"](
        model, variables, {}, images, apply_kwargs=apply_kwargs
    )
    qparams = quantize.calibrate(model, folded, RULES, images, train=False)
    expected = chain.METHODS["bias_correction"](
        model, folded, qparams, images, apply_kwargs=apply_kwargs
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    plain = chain.run((), model, variables, RULES, images, apply_kwargs=apply_kwargs)
    same = quantize.calibrate(model, variables, RULES, images, train=False)
    jax.tree.map(np.testing.assert_array_equal, plain, (variables, same))
    # Each step moved something: the norm's factor into the kernel, the mean into the bias.
    norm = found[0]["batch_stats"]["norm_1"]
    np.testing.assert_allclose(norm["var"], 1 - 1e-5, rtol=1e-6)
    moved = found[0]["params"]["head"]["bias"] - variables["params"]["head"]["bias"]
    assert float(jnp.abs(moved).max()) > 1e-4


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
