"""Teachers: what they say, from what, and what becomes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import models, quantize
from kdq.distill import teacher
from kdq.distill.teacher import TeacherState
from kdq.quantize.network import Weights

IMAGES = jax.random.normal(jax.random.key(0), (3, 6, 6, 1))
SMALL = models.build("cnn", num_classes=3, widths=(2,))
LARGE = models.build("cnn", num_classes=3, widths=(4, 4), batch_norm=True)


def _weights(module, seed):
    variables = jax.jit(module.init)(jax.random.key(seed), IMAGES)
    return Weights(variables=variables, qparams={})


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _logits(module, weights):
    logits = module.apply(weights.variables, IMAGES, train=False)
    return np.asarray(logits, np.float64)


def _ask(teacher, state=None):
    """Its logits of the images; nothing of its state changes."""
    state = teacher.init({}, {}) if state is None else state
    outputs, after = teacher.ask(state, {}, (IMAGES,))
    assert after is state
    return outputs.logits


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(1.0, 1.0), (3.0, 1.0)])
def test_an_ensemble_averages_probabilities_or_logits(shares):
    members = (_weights(SMALL, 1), _weights(LARGE, 2))
    each = [_logits(m, w) for m, w in zip((SMALL, LARGE), members, strict=True)]
    share = np.asarray(shares) / sum(shares)
    make = lambda average: teacher.Ensemble((SMALL, LARGE), members, jnp.float32(shares), average)
    by_logit = _ask(make("logit"))
    np.testing.assert_allclose(by_logit, share[0] * each[0] + share[1] * each[1], rtol=1e-5)
    by_probability = _ask(make("probability"))
    expected = share[0] * _softmax(each[0]) + share[1] * _softmax(each[1])
    # Its logits are logarithms of probabilities that sum to 1 already.
    np.testing.assert_allclose(np.exp(by_probability), expected, rtol=1e-5)


def test_a_quantized_teacher_is_quantized():
    variables = _weights(SMALL, 1).variables
    rules = quantize.uniform_rules(2, 2)
    qparams = quantize.calibrate(SMALL, variables, rules, [IMAGES])
    said = _ask(teacher.Model(SMALL, Weights(variables=variables, qparams=qparams)))
    expected = quantize.predict(SMALL, variables, qparams, IMAGES)
    np.testing.assert_allclose(said, expected, rtol=1e-6)
    assert not np.allclose(said, _logits(SMALL, _weights(SMALL, 1)), rtol=1e-3)


def test_a_moving_average_follows():
    weights = _weights(LARGE, 3)
    params, stats = weights.variables["params"], {"batch_stats": weights.variables["batch_stats"]}
    average = teacher.MovingAverage(LARGE, decay=0.75)
    state = average.init(params, {})
    new = jax.tree.map(lambda x: x + 1.0, params)
    moved = average.update(state, new, stats)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(moved.params), strict=True):
        np.testing.assert_allclose(after, np.asarray(before) + 0.25, rtol=1e-6)
    assert moved.model_state is stats
    said = _ask(average, state.replace(model_state=stats))
    np.testing.assert_allclose(said, _logits(LARGE, weights), rtol=1e-5)


def test_frozen_teachers_have_no_state_and_a_peer_has_what_the_optimizer_trains():
    weights = _weights(LARGE, 3)
    for frozen in (teacher.NO_TEACHER, teacher.Stored(), teacher.Model(LARGE, weights)):
        state = frozen.init(weights.variables["params"], {})
        assert not jax.tree.leaves(state)
        assert frozen.update(state, weights.variables["params"], {}) is state
    peer = teacher.Peer(LARGE, weights.variables)
    state = peer.init({}, {})
    assert state.learns
    assert jax.tree.map(jnp.array_equal, dict(state.variables), weights.variables)
    outputs, after = peer.ask(state, {}, (IMAGES,), key=jax.random.key(0))
    expected, updates = LARGE.apply(weights.variables, IMAGES, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after.model_state, updates)
    assert after.params is state.params


def test_those_without_layers_say_so():
    state, layers = TeacherState(), ("conv_0",)
    ensemble = teacher.Ensemble((SMALL,), (_weights(SMALL, 1),), jnp.ones(1), "logit")
    for asked, words in (
        (ensemble, "no layers of its own"),
        (teacher.Stored(), "no features"),
        (teacher.Peer(SMALL, {}), "compared by its logits"),
    ):
        with pytest.raises(ValueError, match=rf"{words}, asked for \['conv_0'\]"):
            asked.ask(state, {}, (IMAGES,), layers)
    assert teacher.Stored().ask(state, {"teacher_logits": 7})[0].logits == 7
