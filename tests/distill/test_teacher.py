"""Teachers: what they say, from what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import models, quantize
from kdq.distill import teacher

BATCH = {"image": jax.random.normal(jax.random.key(0), (3, 6, 6, 1))}
SMALL = models.build("cnn", num_classes=3, widths=(2,))
LARGE = models.build("cnn", num_classes=3, widths=(4, 4), batch_norm=True)


def _arguments(module, seed):
    variables = jax.jit(module.init)(jax.random.key(seed), BATCH["image"])
    return {"variables": variables, "qparams": {}}


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _logits(module, arguments):
    logits = module.apply(arguments["variables"], BATCH["image"], train=False)
    return np.asarray(logits, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_an_ensemble_averages_probabilities_or_logits(weights):
    members = (_arguments(SMALL, 1), _arguments(LARGE, 2))
    arguments = {"members": members, "weights": jnp.float32(weights)}
    each = [_logits(m, a) for m, a in zip((SMALL, LARGE), members, strict=True)]
    share = np.asarray(weights) / sum(weights)
    by_logit = teacher.Ensemble((SMALL, LARGE), "logit")(arguments, BATCH).logits
    np.testing.assert_allclose(by_logit, share[0] * each[0] + share[1] * each[1], rtol=1e-5)
    by_probability = teacher.Ensemble((SMALL, LARGE), "probability")(arguments, BATCH).logits
    expected = share[0] * _softmax(each[0]) + share[1] * _softmax(each[1])
    # Its logits are logarithms of probabilities that sum to 1 already.
    np.testing.assert_allclose(np.exp(by_probability), expected, rtol=1e-5)


def test_a_quantized_teacher_is_quantized():
    arguments = _arguments(SMALL, 1)
    qparams = quantize.calibrate(
        SMALL,
        arguments["variables"],
        quantize.uniform_rules(2, 2),
        [BATCH["image"]],
    )
    said = teacher.Model(SMALL)({**arguments, "qparams": qparams}, BATCH).logits
    expected = quantize.predict(SMALL, arguments["variables"], qparams, BATCH["image"])
    np.testing.assert_allclose(said, expected, rtol=1e-6)
    assert not np.allclose(said, _logits(SMALL, arguments), rtol=1e-3)


def test_a_moving_average_follows():
    variables = _arguments(LARGE, 3)["variables"]
    average = {"params": variables["params"], "model_state": {}}
    new = jax.tree.map(lambda x: x + 1.0, variables["params"])
    stats = {"batch_stats": variables["batch_stats"]}
    moved = teacher.MovingAverage(LARGE, decay=0.75).follow(average, new, stats)
    for before, after in zip(
        jax.tree.leaves(variables["params"]), jax.tree.leaves(moved["params"]), strict=True
    ):
        np.testing.assert_allclose(after, np.asarray(before) + 0.25, rtol=1e-6)
    assert moved["model_state"] is stats
    said = teacher.MovingAverage(LARGE, 0.75)({**average, "model_state": stats}, BATCH)
    np.testing.assert_allclose(said.logits, _logits(LARGE, {"variables": variables}), rtol=1e-5)


def test_those_without_layers_say_so():
    with pytest.raises(ValueError, match=r"no layers of its own, asked for \['conv_0'\]"):
        teacher.Ensemble((SMALL,), "logit")({}, BATCH, ("conv_0",))
    with pytest.raises(ValueError, match=r"no features, asked for \['conv_0'\]"):
        teacher.Stored()(None, BATCH, ("conv_0",))
    assert teacher.Stored()(None, {**BATCH, "teacher_logits": 7}).logits == 7
