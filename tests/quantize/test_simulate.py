"""The quantized `apply`: values, gradients, what shares a `jit` and what compiles again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations
from flax import linen as nn

from kdq import models
from kdq.quantize import (
    MSE,
    QuantizationRule,
    TensorSpec,
    apply,
    calibrate,
    list_layers,
    predict,
    replace_scales,
    scales,
    uniform_rules,
)

STRIDES = {"conv_0": 1, "conv_1": 2, "conv_2": 2}
LABELS = jnp.arange(12) % 10


def _cnn(widths=(8, 16, 16), seed=0):
    model = models.build("cnn", num_classes=10, widths=widths, strides=(1, 2, 2)[: len(widths)])
    images = jnp.asarray(np.random.default_rng(seed + 100).normal(size=(12, 8, 8, 1)), jnp.float32)
    return model, _draw(model, images, seed=seed), images


def _draw(model, x, seed=1, **kwargs):
    """Variables of the model's shapes, without compiling its initializers."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var", "mean"):
            return jnp.full(leaf.shape, float(path[-1].key != "mean"))
        values = rng.normal(size=leaf.shape)
        if leaf.ndim == 1:  # biases; above 0, so that no unit of a ReLU is dead
            return jnp.asarray(0.3 * np.abs(values), jnp.float32)
        return jnp.asarray(np.sqrt(2 / np.prod(leaf.shape[:-1])) * values, jnp.float32)

    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **kwargs), x)
    return jax.tree.map_with_path(draw, shapes)


def _round_weight(kernel, quantizer):
    """Rounded weights and the mask of those that are not clipped, in float64."""
    scale, qmin, qmax = (
        np.asarray(getattr(quantizer, k), np.float64) for k in ("scale", "qmin", "qmax")
    )
    codes = np.round(np.asarray(kernel, np.float64) / scale)
    return np.clip(codes, qmin, qmax) * scale, (codes >= qmin) & (codes <= qmax)


def _scale_gradient(x, quantizer, g, axes):
    """The learned-step-size gradient, given that of the rounded values, in float64."""
    scale, qmin, qmax = (
        np.asarray(getattr(quantizer, k), np.float64) for k in ("scale", "qmin", "qmax")
    )
    v, g = np.asarray(x, np.float64) / scale, np.asarray(g, np.float64)
    inside = (np.round(v) >= qmin) & (np.round(v) <= qmax)
    each = np.where(inside, np.round(v) - v, np.clip(v, qmin, qmax))
    return (g * each).sum(axes, keepdims=bool(len(axes) < x.ndim))


def _plain_forward(kernels, deltas, biases, quantizers, images):
    """The CNN in bare JAX; `deltas` are added to the rounded inputs. Returns logits and inputs."""

    def rounded(x, name):
        q = quantizers[name]
        code = jnp.round(x / q.scale)
        passed = jnp.where((code >= q.qmin) & (code <= q.qmax), x, 0.0)
        value = jnp.clip(code, q.qmin, q.qmax) * q.scale
        stop = jax.lax.stop_gradient
        return stop(value) + (passed - stop(passed)) + deltas[name]

    inputs, x = {}, images
    for name, stride in STRIDES.items():
        inputs[name] = x
        x = jax.lax.conv_general_dilated(
            rounded(x, name),
            kernels[name],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x + biases[name]
        x = jnp.where(x > 0, x, 0)  # no gradient at 0, where sums of codes often are
    inputs["head"] = x.mean((1, 2))
    return rounded(inputs["head"], "head") @ kernels["head"] + biases["head"], inputs


def _cross_entropy(logits):
    return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(len(LABELS)), LABELS])


@pytest.mark.slow
def test_every_quantized_parameter_gets_its_closed_form_gradient():
    """Straight-through for kernels, learned step size for every scale of weights and inputs."""
    model, variables, images = _cnn()
    qparams = calibrate(model, variables, uniform_rules(4, 4), [images])
    # Calibration clips nothing; smaller scales do.
    qparams = replace_scales(qparams, jax.tree.map(lambda s: 0.7 * s, scales(qparams)))
    params = variables["params"]

    @jax.jit
    def gradients(params, trained):
        def loss(params, trained):
            quantized = replace_scales(qparams, trained)
            return _cross_entropy(apply(model, {"params": params}, quantized, images))

        return jax.value_and_grad(loss, argnums=(0, 1))(params, trained)

    loss, (to_params, to_scales) = gradients(params, scales(qparams))

    weights = {n: _round_weight(params[n]["kernel"], qparams[n]["weights"]) for n in qparams}
    kernels = {n: jnp.asarray(w[0], jnp.float32) for n, w in weights.items()}
    biases = {n: params[n]["bias"] for n in qparams}
    quantizers = {n: qparams[n]["activations"] for n in qparams}

    @jax.jit
    def plain(kernels, biases, deltas):
        logits, inputs = _plain_forward(kernels, deltas, biases, quantizers, images)
        return _cross_entropy(logits), inputs

    deltas = {n: jnp.zeros(v.input_shape) for n, v in list_layers(model, variables, images).items()}
    (expected, inputs), (to_kernels, to_biases, to_inputs) = jax.value_and_grad(
        plain, argnums=(0, 1, 2), has_aux=True
    )(kernels, biases, deltas)

    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert list(to_scales) == [*STRIDES, "head"]
    for name, (_, mask) in weights.items():
        assert 0.01 < 1 - mask.mean() < 0.5
        g = np.asarray(to_kernels[name])
        close = {"rtol": 1e-4, "atol": 1e-5 * np.abs(g).max()}
        np.testing.assert_allclose(to_params[name]["kernel"], mask * g, **close)
        nonzero = np.asarray(to_params[name]["kernel"]) != 0
        assert not nonzero[~mask].any()
        assert nonzero[mask].mean() > 0.7  # the rest met inputs that all round to 0
        np.testing.assert_allclose(to_params[name]["bias"], to_biases[name], **close)
        kernel, spatial = params[name]["kernel"], tuple(range(g.ndim - 1))
        by_hand = _scale_gradient(kernel, qparams[name]["weights"], g, spatial)
        tolerance = {"rtol": 1e-3, "atol": 1e-5 * np.abs(by_hand).max()}
        np.testing.assert_allclose(to_scales[name]["weights"]["scale"], by_hand, **tolerance)
        assert (np.abs(by_hand) > 0).all()
        axes = tuple(range(inputs[name].ndim))
        by_hand = _scale_gradient(inputs[name], quantizers[name], to_inputs[name], axes)
        np.testing.assert_allclose(to_scales[name]["activations"]["scale"], by_hand, rtol=1e-3)
        assert abs(by_hand) > 1e-3


def test_teacher_and_students_share_one_jit_in_any_order():
    teacher, teacher_variables, images = _cnn(widths=(12, 12), seed=1)
    student, variables, _ = _cnn()
    quantized = {
        bits: calibrate(student, variables, uniform_rules(bits, bits), [images]) for bits in (4, 8)
    }
    calls = {
        "teacher": lambda x: teacher.apply(teacher_variables, x, train=False),
        "w4": lambda x: apply(student, variables, quantized[4], x),
        "w8": lambda x: apply(student, variables, quantized[8], x),
        "float": lambda x: student.apply(variables, x, train=False),
    }
    alone = {name: np.asarray(jax.jit(call)(images)) for name, call in calls.items()}
    for order in (list(calls), list(calls)[::-1], ["w8", "teacher", "w4", "float"]):
        together = jax.jit(lambda x, order=order: {name: calls[name](x) for name in order})(images)
        for name, logits in together.items():
            np.testing.assert_array_equal(logits, alone[name], err_msg=f"{name} of {order}")
    # They would not pass for one another.
    error = {n: np.abs(alone[n] - alone["float"]).max() for n in ("w4", "w8")}
    assert error["w4"] > 5 * error["w8"] > 0


CALLS = []


class Counted(nn.Module):
    """Convolutions and a head; counts how often it is traced."""

    @nn.compact
    def __call__(self, x, train):
        CALLS.append(x.shape)
        for width in (4, 6):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


def test_one_compilation_for_fifty_bit_policies():
    rng = np.random.default_rng(0)
    model, images = Counted(), jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
    variables = _draw(model, images, train=False)
    paths = list(list_layers(model, variables, images))
    assert paths == ["Conv_0", "Conv_1", "Dense_0"]
    policies = []
    for bits in rng.integers(1, 9, size=(50, 3, 2)).tolist():
        rules = [
            QuantizationRule(
                path=path,
                weights=TensorSpec(bits=w, granularity="per_channel"),
                activations=TensorSpec(bits=a),
            )
            for path, (w, a) in zip(paths, bits, strict=True)
        ]
        policies.append(calibrate(model, variables, rules, [images]))
    chosen = {float(p[path][k].qmax) for p in policies for path in p for k in p[path]}
    assert chosen == {1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0, 255.0}  # every width did occur

    step = jax.jit(lambda q, x: jax.grad(_sum_of(model, variables, x))(q))
    CALLS.clear()
    predict.clear_cache()  # which programs of other tests may have filled
    with count_compilations("predict") as compiled:
        logits = [np.asarray(predict(model, variables, q, images)) for q in policies]
    assert (len(CALLS), len(compiled)) == (1, 1)
    for qparams in policies:
        step(qparams, images)
    assert (len(CALLS), step._cache_size()) == (2, 1)
    # The counter counts, and the policies did reach the model.
    with count_compilations("predict") as compiled:
        predict(model, variables, policies[0], images[:2])
    assert (len(CALLS), len(compiled)) == (3, 1)
    assert len({v.tobytes() for v in logits}) > 45  # one bit may saturate two alike
    for value, qparams in list(zip(logits, policies, strict=True))[:3]:
        expected = apply(model, variables, qparams, images)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def _sum_of(model, variables, x):
    return lambda qparams: apply(model, variables, qparams, x).sum()


class Heads(nn.Module):
    """Two heads on one image, of which a test quantizes one."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(5, name="left")(x), nn.Dense(5, name="right")(x)


@pytest.mark.parametrize(
    "rules",
    [
        (QuantizationRule(path="right"), *uniform_rules(2, 2)),
        (QuantizationRule(path="left", weights=TensorSpec(bits=2)),),
    ],
    ids=["by a rule without specs", "by no rule"],
)
def test_an_excluded_layer_is_the_float_layer_bit_for_bit(rules):
    model, x = Heads(), jax.random.normal(jax.random.key(0), (6, 3, 3, 1))
    variables = _draw(model, x)
    qparams = calibrate(model, variables, rules, [x])
    assert list(qparams) == ["left"]
    left, right = predict(model, variables, qparams, x)
    float_left, float_right = jax.jit(model.apply)(variables, x)
    np.testing.assert_array_equal(right, float_right)
    assert np.abs(left - float_left).max() > 0.05


def test_weights_alone_are_a_map_over_the_params():
    model, variables, images = _cnn()
    qparams = calibrate(model, variables, uniform_rules(3, None, observer=MSE()), [images])
    assert all(list(q) == ["weights"] for q in qparams.values())
    params = {
        name: {
            **variables["params"][name],
            "kernel": np.float32(
                _round_weight(variables["params"][name]["kernel"], qparams[name]["weights"])[0]
            ),
        }
        for name in qparams
    }
    logits = predict(model, variables, qparams, images)
    float_model = jax.jit(lambda v, x: model.apply(v, x, train=False))
    expected = float_model({"params": params}, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(logits - float_model(variables, images)).max() > 0.01


def test_inputs_alone_are_rounded_before_the_layer():
    dense, x = nn.Dense(7), jax.random.normal(jax.random.key(0), (6, 9))
    variables = _draw(dense, x)
    qparams = calibrate(dense, variables, uniform_rules(None, 3), [x])
    scale = np.abs(np.asarray(x, np.float64)).max() / 3
    rounded = np.clip(np.round(np.asarray(x, np.float64) / scale), -4, 3) * scale
    kernel, bias = (np.asarray(variables["params"][k], np.float64) for k in ("kernel", "bias"))
    expected = rounded @ kernel + bias
    np.testing.assert_allclose(apply(dense, variables, qparams, x), expected, rtol=1e-5, atol=1e-6)


def test_no_qparams_is_the_float_model():
    model, variables, images = _cnn()
    expected = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    np.testing.assert_array_equal(predict(model, variables, {}, images), expected)


@pytest.mark.parametrize("path", ["Conv_7", "block/conv", "head/inner"])
def test_a_layer_that_is_not_there_is_named_with_those_that_are(path):
    model, variables, images = _cnn()
    there = "bias" if path == "head/inner" else "conv_0"
    with pytest.raises(KeyError, match=f"{path}.*{there}"):
        apply(model, variables, {path: {}}, images)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(x))


class Nested(nn.Module):
    """A residual block beside a shared layer, with batch statistics."""

    @nn.compact
    def __call__(self, x, train):
        x = x + Block(name="block")(x, train)
        shared = nn.Dense(4, name="shared")
        return shared(nn.relu(shared(x))).mean((1, 2))


def test_other_collections_pass_through_a_nested_model():
    model, x = Nested(), jax.random.normal(jax.random.key(0), (4, 5, 5, 4))
    variables = _draw(model, x, train=False)
    snapshot = jax.tree.map(np.array, variables)
    qparams = calibrate(model, variables, uniform_rules(4, 8), [x])
    assert list(qparams) == ["block/Conv_0", "shared"]

    def run(train):
        call = lambda v, q, x: apply(model, v, q, x, train=train, mutable=["batch_stats"])
        return jax.jit(call)(variables, qparams, x)

    logits, untouched = run(train=False)
    assert np.isfinite(logits).all()
    jax.tree.map(np.testing.assert_array_equal, untouched["batch_stats"], variables["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, variables, snapshot)

    # In training mode the statistics are those of the quantized convolution, and nothing else.
    _, updates = run(train=True)
    assert jax.tree.structure(dict(updates)) == jax.tree.structure(
        {"batch_stats": variables["batch_stats"]}
    )
    kernel, _ = _round_weight(
        variables["params"]["block"]["Conv_0"]["kernel"], qparams["block/Conv_0"]["weights"]
    )
    scale = np.abs(np.asarray(x, np.float64)).max() / 127
    rounded = np.round(np.asarray(x, np.float64) / scale) * scale
    rounded = np.pad(rounded, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(rounded, (3, 3), axis=(1, 2))
    outputs = np.einsum("nhwcij,ijco->nhwo", windows, kernel)
    mean = updates["batch_stats"]["block"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.2 * outputs.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_remat_keeps_the_quantizers_and_their_gradients():
    class Stack(nn.Module):
        again: bool

        @nn.compact
        def __call__(self, x, train=False):
            layer = nn.remat(nn.Dense) if self.again else nn.Dense
            return layer(3, name="b")(nn.relu(layer(6, name="a")(x)))

    x = jax.random.normal(jax.random.key(0), (8, 4))
    variables = _draw(Stack(again=False), x)
    qparams = calibrate(Stack(again=False), variables, uniform_rules(3, 3), [x])

    def gradient(again):
        run = lambda q: jnp.sum(apply(Stack(again=again), variables, q, x) ** 2)
        return jax.jit(jax.value_and_grad(run))(qparams)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), gradient(True), gradient(False)
    )
    assert all(abs(g["activations"].scale) > 1e-3 for g in gradient(True)[1].values())
