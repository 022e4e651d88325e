"""One step: against Optax by hand, through quantizers in closed form, and what it must not do."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilations import count_compilations

from kdq import config, models, quantize
from kdq.quantize import QuantizationRule, TensorSpec
from kdq.quantize.network import Weights
from kdq.train.objective import Objective
from kdq.train.optimizer import make_optimizer
from kdq.train.step import train_step
from kdq.train.training import Training, create_state


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def host(tree):
    """A copy that outlives donation."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


@pytest.mark.parametrize("teacher", [False, True])
def test_equals_plain_flax_and_optax(net, teacher):
    """Four steps of Adam with warm-up and cosine decay, batch norm and distillation by hand."""
    steps, rate, alpha, temperature = 20, 0.01, 0.6, 3.0

    def schedule(count):
        done = (count + 0.5) / steps
        return rate * jnp.minimum(1, done / 0.05) * 0.5 * (1 + jnp.cos(math.pi * done))

    def loss_fn(params, stats, batch):
        logits, updates = net.model.apply(
            {"params": params, "batch_stats": stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        log_q = jax.nn.log_softmax(logits)
        loss = -jnp.take_along_axis(log_q, batch["label"][:, None], 1).mean()
        if teacher:
            soft = net.teacher.apply(net.teacher_variables, batch["image"]) / temperature
            p, log_q = jax.nn.softmax(soft), jax.nn.log_softmax(logits / temperature)
            kl = (p * (jax.nn.log_softmax(soft) - log_q)).sum(-1).mean()
            loss = (1 - alpha) * loss + alpha * temperature**2 * kl
        return loss, updates["batch_stats"]

    @jax.jit
    def plain_step(params, stats, opt_state, batch):
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, batch)
        updates, opt_state = adam.update(grads, opt_state)
        return optax.apply_updates(params, updates), stats, opt_state, loss, grads

    adam = optax.adam(schedule)
    params, stats = net.variables["params"], net.variables["batch_stats"]
    opt_state = adam.init(params)
    state = net.state(steps=steps, learning_rate=rate)
    objective = net.objective(alpha, temperature) if teacher else Objective()
    for i in range(4):
        batch = net.batch(i)
        state, metrics = net.step(state, batch, objective, teacher=teacher)
        params, stats, opt_state, loss, grads = plain_step(params, stats, opt_state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
        assert metrics["correct"].count == len(batch["label"])
    assert int(state.step) == 4
    assert not state.halted
    assert state.scales == {}
    assert_trees_close(state.params, params, rtol=1e-4, atol=1e-5)
    assert_trees_close(state.model_state, {"batch_stats": stats}, rtol=1e-4, atol=1e-5)


def test_gradients_through_quantizers_in_closed_form():
    """One linear layer, quantized weights and inputs, SGD: dW, db and the signs of d scale."""
    model = models.build("mlp", num_classes=3, widths=())
    rng = np.random.default_rng(0)
    # The last rows go beyond the calibrated range, where gradients to the input's scale differ.
    images = rng.normal(size=(12, 2, 2, 1)).astype(np.float32)
    labels = rng.integers(0, 3, 12).astype(np.int32)
    kernel = rng.normal(size=(4, 3)).astype(np.float32)
    bias = rng.normal(size=3).astype(np.float32)
    variables = {"params": {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}}
    rule = QuantizationRule(
        path="head",
        weights=TensorSpec(bits=3, granularity="per_channel"),
        activations=TensorSpec(bits=4),
    )
    qparams = quantize.calibrate(model, variables, (rule,), [images[:6]])
    # Scales smaller than calibration chose them: some weights and inputs are clipped.
    qparams = jax.tree.map(jnp.asarray, qparams)
    for half in ("weights", "activations"):
        quantizer = qparams["head"][half]
        qparams["head"][half] = quantizer.replace(scale=0.7 * quantizer.scale)
    settings = config.Optimizer(name="sgd", warmup=0.0, scale_rate=2.0)
    weights = Weights(variables=variables, qparams=qparams)
    state = create_state(weights, settings, seed=0, steps=10, learning_rate=0.1)
    training = Training(network=model, optimizer=make_optimizer(settings), objective=Objective())
    state, _ = train_step(training, state, {"image": images, "label": labels})

    def rounded(x, scale, bits):
        v, top = np.asarray(x, np.float64) / scale, 2 ** (bits - 1)
        q = np.clip(np.round(v), -top, top - 1)
        inside = (np.round(v) >= -top) & (np.round(v) < top)
        assert inside.any()
        assert not inside.all()
        return q * scale, inside, np.where(inside, q - v, q)

    before = {k: np.asarray(q.scale, np.float64) for k, q in qparams["head"].items()}
    x, _, x_slope = rounded(images.reshape(12, 4), before["activations"], 4)
    w, w_in, w_slope = rounded(kernel, before["weights"], 3)
    logits = x @ w + bias
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    d_logits = (p - np.eye(3)[labels]) / 12
    d_w, d_x = x.T @ d_logits, d_logits @ w.T
    rate = 0.1 * 0.5 * (1 + math.cos(math.pi * 0.5 / 10))
    # Nesterov's first step is 1.9 gradients.
    new = state.params["head"]
    np.testing.assert_allclose(
        new["kernel"], kernel - 1.9 * rate * d_w * w_in, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(new["bias"], bias - 1.9 * rate * d_logits.sum(0), rtol=1e-4)
    # Adam's first relative step has the rate's size and the gradient's sign.
    d_scale = {
        "weights": (d_w * w_slope).sum(0, keepdims=True),
        "activations": (d_x * x_slope).sum(),
    }
    for half, gradient in d_scale.items():
        assert np.abs(gradient).min() > 1e-4
        expected = before[half] * np.exp(-2.0 * rate * np.sign(gradient))
        np.testing.assert_allclose(state.scales["head"][half]["scale"], expected, rtol=1e-4)


def test_recompiles_for_new_shapes_only(net):
    """alpha, temperature, rate, seed, steps and bit-widths are numbers: one compiled step."""
    batch = net.batch(0)

    def take(batch, bits, *, alpha=0.5, temperature=2.0, warmup=0.1, **fields):
        settings = config.Optimizer(name="sgd", clip_norm=9.0, warmup=warmup)  # used nowhere else
        state, _ = net.step(
            net.state(net.qparams(bits), settings, **fields),
            batch,
            net.objective(alpha, temperature),
            teacher=True,
            optimizer=settings,
        )
        return state

    train_step.clear_cache()  # which programs of other tests may have filled
    with count_compilations("train_step") as compiled:
        reference = take(batch, 4)
    assert len(compiled) == 1
    with count_compilations("train_step") as compiled:
        variants = (
            take(batch, 4, alpha=0.9),
            take(batch, 4, temperature=5.0),
            take(batch, 4, learning_rate=0.5),
            take(batch, 4, steps=3),
            take(batch, 4, warmup=0.9),
            take(batch, 2),
            take(batch, 8),
        )
        take(batch, 4, seed=7)
    assert not compiled
    # Nor are the numbers baked in: each one changes the outcome.
    head = reference.params["head"]["kernel"]
    for state in variants:
        assert not np.array_equal(state.params["head"]["kernel"], head)
    with count_compilations("train_step") as compiled:
        take(net.batch(0, size=5), 4)
    assert len(compiled) == 1


def test_live_and_cached_teacher_give_the_same_steps(net):
    objective = net.objective(0.8, 4.0)
    live, cached, alone = net.state(), net.state(), net.state()
    for i in range(3):
        batch = net.batch(i)
        logits = net.teacher.apply(net.teacher_variables, batch["image"], train=False)
        live, live_metrics = net.step(live, batch, objective, teacher=True)
        cached, cached_metrics = net.step(
            cached, {**batch, "teacher_logits": logits}, objective, teacher="stored"
        )
        alone, _ = net.step(alone, batch, Objective())
    assert_trees_close(live.params, cached.params, rtol=1e-5, atol=1e-6)
    assert_trees_close(live_metrics, cached_metrics, rtol=1e-5, atol=1e-6)
    assert np.abs(live.params["head"]["kernel"] - alone.params["head"]["kernel"]).max() > 1e-4


def test_the_state_is_donated_and_the_variables_are_not(net):
    state = net.state(net.qparams())
    old = jax.tree.leaves((state.params, state.scales, state.opt_state, state.model_state))
    kept = host(net.variables)
    net.step(state, net.batch(0), Objective())
    assert all(leaf.is_deleted() for leaf in old)
    assert_trees_equal(host(net.variables), kept)


def test_scales_train_and_stay_positive(net):
    qparams = net.qparams(bits=2)
    state = net.state(qparams, learning_rate=0.3)  # thirty times the usual rate
    for i in range(15):
        state, metrics = net.step(state, net.batch(i), Objective())
    assert np.isfinite(metrics["loss"])
    for path, halves in quantize.scales(qparams).items():
        for half, before in halves.items():
            now = np.asarray(state.scales[path][half]["scale"])
            assert (now > 0).all()
            assert (now != before["scale"]).any(), (path, half)
            np.testing.assert_array_equal(state.quantizers[path][half].scale, now)
    for path, halves in qparams.items():  # what does not train stays
        for half, quantizer in halves.items():
            for name in ("zero_point", "qmin", "qmax"):
                now = getattr(state.quantizers[path][half], name)
                np.testing.assert_array_equal(now, getattr(quantizer, name))


def test_scales_that_do_not_train_stay(net):
    qparams = net.qparams()
    state = net.state(qparams, fixed_scales=(".*",))
    assert state.scales == {}
    state, _ = net.step(state, net.batch(0), Objective())
    assert state.scales == {}
    assert_trees_equal(host(state.quantizers), host(qparams))
    assert not np.array_equal(
        state.params["head"]["kernel"], net.variables["params"]["head"]["kernel"]
    )


def test_a_fixed_scale_stays_while_the_others_train(net):
    qparams = net.qparams(bits=2)
    fixed, *others = [(path, half) for path, halves in qparams.items() for half in halves]
    state = net.state(qparams, learning_rate=0.3, fixed_scales=("/".join(fixed),))
    for i in range(3):
        state, _ = net.step(state, net.batch(i), Objective())
    moved = lambda path, half: (
        not np.array_equal(state.quantizers[path][half].scale, qparams[path][half].scale)
    )
    assert not moved(*fixed)
    assert all(moved(*one) for one in others)


@pytest.mark.parametrize(("value", "quantized"), [(np.nan, True), (np.nan, False), (np.inf, False)])
def test_a_step_that_is_not_finite_halts_the_state_unchanged(net, value, quantized):
    state = net.state(net.qparams() if quantized else {})
    for i in range(2):
        state, _ = net.step(state, net.batch(i), Objective())
    before = host(state)
    bad = net.batch(2)
    bad["image"][3, 1, 1, 0] = value
    state, metrics = net.step(state, bad, Objective())
    assert not np.isfinite(metrics["loss"])
    assert_trees_equal(host(state), before.replace(halted=np.bool_(True)))
    # For good: a batch with nothing wrong changes nothing any more.
    state, metrics = net.step(state, net.batch(3), Objective())
    assert np.isfinite(metrics["loss"])
    assert_trees_equal(host(state), before.replace(halted=np.bool_(True)))


@pytest.mark.slow
def test_dropout_differs_by_step_and_seed():
    """The key of a step is fold_in(key(seed), step)."""

    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            x = nn.Dense(3, name="dense")(x.reshape(len(x), -1))
            return nn.Dropout(0.5, deterministic=not train)(x)

    model = Dropping()
    batch = {"image": np.ones((4, 6), np.float32), "label": np.zeros(4, np.int32)}
    variables = jax.jit(model.init)(jax.random.key(0), batch["image"])
    settings = config.Optimizer()
    training = Training(network=model, optimizer=make_optimizer(settings), objective=Objective())

    def loss(seed, step):
        weights = Weights(variables=variables, qparams={})
        state = create_state(weights, settings, seed=seed, steps=9, learning_rate=0.1)
        _, metrics = train_step(training, state.replace(step=jnp.int32(step)), batch)
        return float(metrics["loss"])

    key = jax.random.fold_in(jax.random.key(5), 3)
    logits = model.apply(variables, batch["image"], train=True, rngs={"dropout": key})
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    np.testing.assert_allclose(loss(5, 3), expected, rtol=1e-5)
    assert len({loss(5, 3), loss(5, 4), loss(6, 3)}) == 3
