"""Steps with features, a peer, a moving average: against plain JAX, and through a restart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resume_training

from kdq.distill import capture, term
from kdq.distill.teacher import Model, MovingAverage, Peer
from kdq.quantize.network import Weights
from kdq.train import loop
from kdq.train.objective import Objective
from kdq.train.training import create_state

RATE, STEPS = 0.01, 20


def _assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), a, b)


def _objective(*entries):
    terms = tuple(term.build(e["loss"], e, e["loss"]) for e in entries)
    return Objective(terms=terms, steps=jnp.float32(STEPS))


def _beside(net, objective, teacher=None):
    images = net.batch(0)["image"]
    layers = lambda model, variables: capture.list_outputs(model, variables, images)
    student = layers(net.model, net.variables)
    taught_by = layers(net.teacher, net.teacher_variables)
    return objective.init(jax.random.key(5), student, taught_by, num_examples=64)


@pytest.mark.slow
def test_a_hint_trains_the_student_and_its_adapter_as_plain_jax_would(net):
    objective = _objective(
        {"loss": "hint", "weight": 0.7, "student": "conv_0", "teacher": "conv_0"}
    )
    adapters, memory = _beside(net, objective)
    assert memory == {}
    state = net.state(steps=STEPS, learning_rate=RATE, adapters=adapters)

    def loss_fn(trainable, stats, batch):
        (logits, updates) = net.model.apply(
            {"params": trainable["params"], "batch_stats": stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        log_q = jax.nn.log_softmax(logits)
        task = -jnp.take_along_axis(log_q, batch["label"][:, None], 1).mean()
        convolve = lambda p: jax.lax.conv_general_dilated(
            batch["image"], p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        adapter = trainable["adapter"]
        student = convolve(trainable["params"]["conv_0"]["kernel"])
        own = net.teacher_variables["params"]["conv_0"]
        teacher = convolve(own["kernel"]) + own["bias"]
        hint = jnp.square(student @ adapter["kernel"] + adapter["bias"] - teacher).mean()
        return task + 0.7 * hint, updates["batch_stats"]

    adam = optax.adam(
        lambda count: (
            RATE
            * jnp.minimum(1, (count + 0.5) / STEPS / 0.05)
            * 0.5
            * (1 + jnp.cos(jnp.pi * (count + 0.5) / STEPS))
        )
    )
    plain = {"params": net.variables["params"], "adapter": adapters["hint"]["adapter"]}
    stats, opt_state = net.variables["batch_stats"], adam.init(plain)
    for i in range(3):
        state, metrics = net.step(state, net.batch(i), objective, teacher=True)
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(plain, stats, net.batch(i))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        updates, opt_state = adam.update(grads, opt_state)
        plain = optax.apply_updates(plain, updates)
    _assert_close(state.params, plain["params"])
    _assert_close(state.adapters["hint"]["adapter"], plain["adapter"])


def test_clipping_counts_the_adapters(net):
    """A huge loss on the adapter's output: one global norm bounds what moves."""
    objective = _objective(
        {"loss": "hint", "weight": 1e6, "student": "conv_0", "teacher": "conv_0"}
    )
    adapters, _ = _beside(net, objective)
    settings = resume_training.config.Optimizer(name="sgd", warmup=0.0, clip_norm=1e-3)
    state = net.state(optimizer=settings, steps=STEPS, learning_rate=1.0, adapters=adapters)
    before = jax.tree.map(np.array, state.trainable)
    state, metrics = net.step(state, net.batch(0), objective, teacher=True, optimizer=settings)
    assert metrics["grad_norm"] > 1e3
    moved = optax.tree.norm(optax.tree.sub(state.trainable, before))
    # Nesterov's first step is 1.9 gradients.
    np.testing.assert_allclose(moved, 1.9e-3, rtol=0.02)


@pytest.mark.slow
def test_peers_learn_from_each_other_as_two_plain_models_do(net):
    objective = net.objective(0.5, 2.0)
    peer = Peer(net.teacher, net.teacher_variables)
    state = net.state(steps=STEPS, learning_rate=RATE, teacher=peer)
    batch = net.batch(0)
    new, metrics = net.step(state, batch, objective, teacher=peer)

    def both(params):
        student = net.model.apply(
            {**net.variables, "params": params["student"]},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )[0]
        peer = net.teacher.apply({"params": params["peer"]}, batch["image"], train=True)

        def one(own, other):
            other = jax.lax.stop_gradient(other)
            log_q, log_p = jax.nn.log_softmax(own / 2), jax.nn.log_softmax(other / 2)
            kl = 4 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
            task = optax.softmax_cross_entropy_with_integer_labels(own, batch["label"])
            return (0.5 * task + 0.5 * kl).mean()

        return one(student, peer) + one(peer, student), one(student, peer)

    start = {"student": net.variables["params"], "peer": net.teacher_variables["params"]}
    grads, own = jax.grad(both, has_aux=True)(start)
    np.testing.assert_allclose(metrics["loss"], own, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    # Adam's first step has the gradient's sign; where that is clear, both models took it.
    for after, gradient, before in (
        (new.params, grads["student"], start["student"]),
        (new.teacher.params, grads["peer"], start["peer"]),
    ):
        for a, g, b in zip(*map(jax.tree.leaves, (after, gradient, before)), strict=True):
            clear = np.abs(g) > 1e-5
            np.testing.assert_array_equal(np.sign(a - b)[clear], -np.sign(g)[clear])


def test_a_moving_average_teaches_from_the_state(net):
    objective = net.objective(0.5, 2.0)
    teacher = MovingAverage(net.model, decay=0.9)
    state = net.state(steps=STEPS, learning_rate=0.1, teacher=teacher)
    expected = jax.tree.map(np.array, net.variables["params"])
    for i in range(3):
        batch = net.batch(i)
        variables = {"params": expected, **jax.tree.map(np.array, state.model_state)}
        said = net.model.apply(variables, batch["image"], train=False)
        own = net.model.apply(state.variables, batch["image"], train=True, mutable=["batch_stats"])[
            0
        ]
        log_p, log_q = jax.nn.log_softmax(said / 2), jax.nn.log_softmax(own / 2)
        kl = 4 * (jnp.exp(log_p) * (log_p - log_q)).sum()
        state, metrics = net.step(state, batch, objective, teacher=teacher)
        np.testing.assert_allclose(metrics["kl_loss"].total, kl, rtol=1e-3, atol=1e-5)
        expected = jax.tree.map(lambda m, p: 0.9 * m + 0.1 * np.array(p), expected, state.params)
        _assert_close(state.teacher.params, expected)
    assert optax.tree.norm(optax.tree.sub(expected, state.params)) > 1e-2


def _plan(terms, teacher):
    """That of `resume_training`, taught another way."""
    plan, _ = resume_training.make()
    variables, teacher_variables, qparams, validation = resume_training.start()
    image = validation[0]["image"][:1]
    objective = _objective(*terms)
    layers = lambda model, v: capture.list_outputs(model, v, image)
    adapters, memory = objective.init(
        jax.random.key(0),
        layers(resume_training.MODEL, variables),
        layers(resume_training.TEACHER, teacher_variables),
        num_examples=resume_training.EXAMPLES,
    )
    state = create_state(
        Weights(variables=variables, qparams=qparams),
        resume_training.OPTIMIZER,
        seed=0,
        steps=resume_training.STEPS,
        learning_rate=0.01,
        adapters=adapters,
        memory=memory,
        teacher=teacher,
    )
    training = plan.training.replace(objective=objective, teacher=teacher)
    return dataclasses.replace(plan, training=training), state


FEATURES = (
    {"loss": "hint", "student": "conv_1", "teacher": "conv_0", "adapter": "linear"},
    {"loss": "contrastive", "student": "conv_1", "teacher": "conv_0", "dim": 4, "negatives": 8},
)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) for k in ("features", "peer", "average")]
)
def test_a_run_that_was_cut_off_ends_with_the_same_bits(tmp_path, kind):
    """Adapters, a contrastive memory, a peer and an average are checkpointed, and restored."""
    _, teacher_variables, _, _ = resume_training.start()

    def make():
        if kind == "features":
            weights = Weights(variables=teacher_variables, qparams={})
            terms = [f | {"teacher": "conv_0"} for f in FEATURES]
            terms[0] = terms[0] | {"student": "conv_0", "adapter": "conv"}
            return _plan(terms, Model(resume_training.TEACHER, weights))
        kl = [{"loss": "kl", "weight": 0.5, "temperature": 2.0}]
        if kind == "peer":
            return _plan(kl, Peer(resume_training.TEACHER, teacher_variables))
        return _plan(kl, MovingAverage(resume_training.MODEL, 0.9))

    class Stop(Exception):
        pass

    def stop(step):
        if step == 14:  # between two checkpoints
            raise Stop

    whole = loop.fit(*make(), tmp_path / "whole", checkpoint_seconds=0.0)
    with pytest.raises(Stop):
        loop.fit(*make(), tmp_path / "cut", checkpoint_seconds=0.0, on_step=stop)
    resumed = loop.fit(*make(), tmp_path / "cut", checkpoint_seconds=0.0)
    for a, b in ((whole.last, resumed.last), (whole.selected.weights, resumed.selected.weights)):
        jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
        jax.tree.map(np.testing.assert_array_equal, a.qparams, b.qparams)
    curves = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut")]
    assert curves[0] == curves[1]
