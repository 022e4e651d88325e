"""Random streams: a model trains whatever its modules call them, and a step's numbers are fixed."""

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.errors import InvalidRngError

from kdq import config
from kdq.distill.capture import with_streams
from kdq.quantize.network import Weights
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.step import train_step
from kdq.train.training import Training, create_state


class Dropping(nn.Module):
    """Stochastic depth and noise by streams of their own, and Flax's dropout."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = x.reshape(len(x), -1)
        if train:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
            x = x * jax.random.bernoulli(self.make_rng("drop_path"), 0.5, (len(x), 1))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x)


IMAGES = np.random.default_rng(0).normal(size=(8, 2, 2, 1)).astype(np.float32)
LABELS = np.arange(8, dtype=np.int32) % 3
VARIABLES = {"params": {"head": {"kernel": jnp.ones((4, 3)) / 3, "bias": jnp.zeros(3)}}}


def explicit(key):
    """The streams of `Dropping`, by hand."""
    named = {n: jax.random.fold_in(key, zlib.crc32(n.encode())) for n in ("noise", "drop_path")}
    return {"dropout": key, **named}


def test_each_stream_has_a_key_of_its_step_and_name():
    key = jax.random.key(7)
    forward = lambda rngs: Dropping().apply(VARIABLES, IMAGES, train=True, rngs=rngs)
    logits = with_streams(forward, key)
    np.testing.assert_array_equal(logits, forward(explicit(key)))
    assert not np.allclose(logits, with_streams(forward, jax.random.key(8)))
    names = with_streams(lambda rngs: forward(rngs) is not None and set(rngs), key)
    assert names == {"dropout", "noise", "drop_path"}


def test_a_model_without_another_stream_draws_dropout_as_before():
    key, drop = jax.random.key(3), nn.Dropout(0.5, deterministic=False)
    drawn = with_streams(lambda rngs: drop.apply({}, IMAGES, rngs=rngs), key)
    np.testing.assert_array_equal(drawn, drop.apply({}, IMAGES, rngs={"dropout": key}))


def test_a_stream_that_a_transform_keeps_out_is_flax_own_error():
    body = nn.scan(
        lambda module, x, _: (x + jax.random.normal(module.make_rng("noise"), x.shape), None),
        variable_broadcast="params",
        split_rngs={"dropout": True},
        length=2,
    )

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(self, x, None)[0]

    with pytest.raises(InvalidRngError, match='needs PRNG for "noise"'):
        with_streams(lambda rngs: Loop().apply({}, jnp.ones(3), rngs=rngs), jax.random.key(0))


def test_a_step_trains_by_the_gradient_with_these_streams():
    """Two steps of SGD: the second draws other numbers, and a run again draws the same."""
    settings = config.Optimizer(name="sgd", warmup=0.0)
    training = Training(
        network=Dropping(), optimizer=make_optimizer(settings), objective=Objective()
    )

    def run():
        weights = Weights(variables=VARIABLES, qparams={})
        state = create_state(weights, settings, seed=5, steps=10, learning_rate=0.1)
        norms = []
        for _ in range(2):
            state, metrics = train_step(training, state, {"image": IMAGES, "label": LABELS})
            norms.append(float(metrics["grad_norm"]))
        return norms

    def by_hand(params, step):
        rngs = explicit(jax.random.fold_in(jax.random.key(5), step))

        def loss(params):
            logits = Dropping().apply({"params": params}, IMAGES, train=True, rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

        return float(optax.tree.norm(jax.grad(loss)(params)))

    norms = run()
    assert norms == run()
    np.testing.assert_allclose(norms[0], by_hand(VARIABLES["params"], 0), rtol=1e-5)
    assert abs(norms[0] - by_hand(VARIABLES["params"], 1)) > 1e-3
