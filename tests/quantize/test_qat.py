"""Methods of quantization-aware training against their papers' formulae in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import quantize
from kdq.deploy import load_packed, save_packed
from kdq.models import build
from kdq.quantize import Quantizer, Training, fake_quantize, grid, qat
from kdq.quantize.layers import list_layers
from kdq.quantize.network import Weights
from kdq.quantize.ste import transformed

RNG = np.random.default_rng(0)


def _unsigned(bits, scale):
    top = 2.0**bits - 1
    return Quantizer(*(jnp.float32(v) for v in (scale, 0.0, 0.0, top)))


def _gradients(x, quantizer, g):
    """`(value, d/dx, d/dscale, d/dzero_point)`."""

    def run(x, scale, zero_point):
        return fake_quantize(x, quantizer.replace(scale=scale, zero_point=zero_point))

    y, pull = jax.vjp(run, jnp.asarray(x), quantizer.scale, quantizer.zero_point)
    return y, *pull(jnp.asarray(g))


@pytest.fixture
def case():
    x = RNG.normal(size=(50, 6)).astype(np.float32)
    return x, RNG.normal(size=x.shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(), (1, 6), (10, 6)])
def test_gradient_scale_is_one_over_the_root_of_elements_times_qmax(case, shape):
    x, g = case
    scale = np.exp(0.3 * RNG.normal(size=shape)).astype(np.float32) / 4
    plain = Quantizer(jnp.asarray(scale), jnp.zeros(shape), jnp.float32(-4), jnp.float32(3))
    scaled = plain.replace(training=Training(gradient_scale=True))
    wide = np.broadcast_to(scale, (1, 6)) if len(shape) < 2 or shape[0] == 1 else None
    wide = np.repeat(scale, 5, axis=0) if wide is None else np.broadcast_to(wide, x.shape)
    v = x.astype(np.float64) / wide
    each = g * np.where(
        (np.round(v) >= -4) & (np.round(v) <= 3), np.round(v) - v, np.clip(v, -4, 3)
    )
    groups = max(1, scale.size)
    total = each.reshape(shape[0], -1, 6).sum(1) if shape else each.sum()
    _, _, found, _ = _gradients(x, scaled, g)
    expected = total / np.sqrt(x.size / groups * 3)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_pact_learns_its_bound_from_what_it_clips(case):
    x, g = case
    bound, decay = 0.9, 0.01
    training = dataclasses.replace(qat.METHODS["pact"].activations, decay=decay)
    quantizer = _unsigned(3, bound / 7).replace(training=training)
    y, dx, d_scale, _ = _gradients(x, quantizer, g)
    x64 = x.astype(np.float64)
    expected = np.round(np.clip(x64, 0, bound) * 7 / bound) * bound / 7
    np.testing.assert_allclose(y, expected, atol=1e-6)
    # Equations 2 and 3: dy/dbound is 1 where the bound clips and 0 elsewhere; bound = 7 · scale.
    clipped = np.round(x64 * 7 / bound) > 7
    assert 0.05 < clipped.mean() < 0.5
    np.testing.assert_allclose(d_scale, 7 * (g[clipped].sum() + decay * bound), rtol=1e-4)
    inside = (np.round(x64 * 7 / bound) >= 0) & ~clipped
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))


@pytest.mark.parametrize("shape", [(1, 1), (1, 6)], ids=["tensor", "channel"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_weights(case, bits, shape):
    x, g = case
    x = (x * np.linspace(0.2, 3.0, 6)).astype(np.float32)  # channels of very different ranges
    layer = {"weights": grid.from_range(-jnp.ones(shape), jnp.ones(shape), bits)}
    variables = {"params": {"layer": {"kernel": jnp.asarray(x)}}}
    moved, qparams = quantize.prepare(variables, {"layer": layer}, "dorefa")
    quantizer, w = qparams["layer"]["weights"], np.asarray(moved["params"]["layer"]["kernel"])
    y, dx, _, _ = _gradients(w, quantizer, g)
    # Equation 9, times the largest weight that was, of the tensor or of each channel:
    # 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1.
    axes = None if shape == (1, 1) else 0
    t, top = np.tanh(w.astype(np.float64)), np.abs(x).max(axes).astype(np.float64)
    most = np.abs(t).max(axes)
    steps = 2**bits - 1
    unit = t / (2 * most) + 0.5
    np.testing.assert_allclose(y, top * (2 * np.round(unit * steps) / steps - 1), atol=1e-5)
    np.testing.assert_allclose(dx, g * top * (1 - t**2) / most, rtol=1e-4, atol=1e-5)
    # Weights start where the tanh makes of them what they were: nothing but rounding is new.
    np.testing.assert_allclose(transformed(jnp.asarray(w), quantizer), x, rtol=1e-4, atol=1e-6)
    # What it ends as is a plain quantizer of the transformed weight, with the same numbers.
    finished, plain = quantize.finish(moved, {"layer": {"weights": quantizer}})
    assert plain["layer"]["weights"].training == Training()
    again = fake_quantize(finished["params"]["layer"]["kernel"], plain["layer"]["weights"])
    np.testing.assert_allclose(again, y, atol=1e-5)
    np.testing.assert_array_equal(variables["params"]["layer"]["kernel"], x)


def test_dorefa_keeps_a_channel_of_zeros():
    kernel = jnp.asarray([[0.0, 1.0], [0.0, -0.5]])
    layer = {"weights": grid.from_range(-jnp.ones((1, 2)), jnp.ones((1, 2)), 3)}
    variables = {"params": {"layer": {"kernel": kernel}}}
    moved, qparams = quantize.prepare(variables, {"layer": layer}, "dorefa")
    quantizer = qparams["layer"]["weights"]
    again = transformed(moved["params"]["layer"]["kernel"], quantizer)
    np.testing.assert_allclose(again, kernel, atol=1e-6)
    assert jnp.isfinite(quantizer.scale).all()


@pytest.mark.parametrize("scale", [0.11, 0.25, 0.26])
def test_tqt_rounds_the_scale_up_to_a_power_of_two(case, scale):
    x, g = case
    layer = {"activations": _unsigned(3, scale)}
    quantizer = quantize.prepare({}, {"layer": layer}, "tqt")[1]["layer"]["activations"]
    y, _, d_scale, _ = _gradients(x, quantizer, g)
    power = 2.0 ** np.ceil(np.log2(scale))
    v = x.astype(np.float64) / power
    code = np.clip(np.round(v), 0, 7)
    np.testing.assert_allclose(y, code * power, atol=1e-6)
    # Equation 7: d/dlog2(t) = s ln 2 (round(v) - v) inside, s ln 2 · code outside.
    each = np.where((np.round(v) >= 0) & (np.round(v) <= 7), np.round(v) - v, code)
    by_log2 = (g * power * np.log(2) * each).sum()
    np.testing.assert_allclose(d_scale * scale * np.log(2), by_log2, rtol=1e-4)


def test_ewgs_scales_each_gradient_by_its_rounding_error(case):
    x, g = case
    training = Training(elementwise=0.2)
    quantizer = _unsigned(2, 0.4).replace(zero_point=jnp.float32(1), training=training)
    _, dx, _, _ = _gradients(x, quantizer, g)
    v = x.astype(np.float64) / 0.4 + 1
    inside = (np.round(v) >= 0) & (np.round(v) <= 3)
    expected = np.where(inside, g * (1 + 0.2 * np.sign(g) * (v - np.round(v))), 0)
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-5)


def test_lsq_plus_trains_offsets_of_activations_alone():
    qparams = {
        "layer": {
            "weights": grid.from_range(-1.0, 1.0, 4),
            "activations": grid.from_range(-0.2, 1.0, 4, symmetric=False),
        }
    }
    trained = quantize.scales(quantize.prepare({}, qparams, "lsq_plus")[1])["layer"]
    assert {k: sorted(v) for k, v in trained.items()} == {
        "weights": ["scale"],
        "activations": ["scale", "zero_point"],
    }
    assert quantize.scales(quantize.prepare({}, qparams, "ste")[1]) == {}


METHODS = [
    method if method in ("lsq", "pact") else pytest.param(method, marks=pytest.mark.slow)
    for method in qat.METHODS
]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_in_a_file_that_says_what_was_trained(method, tmp_path):
    """Loss falls over some steps; the finished model is the trained one, in the packed file too."""
    model = build("mlp", num_classes=3, widths=(12,))
    images = jnp.asarray(RNG.normal(size=(32, 3, 3, 1)), jnp.float32)
    labels = jnp.argmax(images.reshape(32, -1)[:, :3], -1)
    variables = model.init(jax.random.key(0), images, train=False)
    calibrated = quantize.calibrate(model, variables, quantize.uniform_rules(3, 4), [images])
    variables, qparams = quantize.prepare(variables, calibrated, method)

    def loss(trained, qparams):
        params, scales = trained
        out = quantize.apply(
            model, {"params": params}, quantize.replace_scales(qparams, scales), images
        )
        return -jax.nn.log_softmax(out)[jnp.arange(32), labels].mean()

    step = jax.jit(jax.value_and_grad(loss))
    trained, values = (variables["params"], quantize.scales(qparams)), []
    for _ in range(25):
        value, gradient = step(trained, qparams)
        values.append(float(value))
        rate = (0.3, 0.003)
        trained = tuple(
            jax.tree.map(lambda p, d, r=r: p - r * d, t, d)
            for t, d, r in zip(trained, gradient, rate, strict=True)
        )
    assert np.mean(values[-3:]) < 0.9 * values[0]
    qparams = quantize.replace_scales(qparams, trained[1])
    expected = quantize.apply(model, {"params": trained[0]}, qparams, images)
    finished = quantize.finish({"params": trained[0]}, qparams)
    np.testing.assert_allclose(
        quantize.predict(model, *finished, images), expected, rtol=1e-4, atol=1e-4
    )
    weights = Weights(variables=finished[0], qparams=finished[1])
    save_packed(tmp_path / "m", weights, model={"name": "mlp", "num_classes": 3, "widths": (12,)})
    np.testing.assert_allclose(load_packed(tmp_path / "m")(images), expected, rtol=1e-4, atol=1e-4)


def test_widened_grids_span_the_same_range_with_whole_codes():
    qparams = {
        "a": {
            "weights": grid.from_range(-jnp.ones((1, 3)), 2 * jnp.ones((1, 3)), 3),
            "activations": grid.from_range(-0.5, 1.0, 4, symmetric=False),
            "other": grid.from_range(0.0, 1.0, 8, signed=False),
        },
        "sign": {"weights": grid.from_range(-1.0, 1.0, 1)},
    }
    for bits in (1, 2, 4, 8, 16):
        for path, of in jax.jit(quantize.widened)(qparams, bits).items():
            for name, new in of.items():
                old = qparams[path][name]
                for end in ("qmin", "qmax"):
                    reach = [
                        np.asarray((getattr(q, end) - q.zero_point) * q.scale) for q in (old, new)
                    ]
                    np.testing.assert_allclose(reach[1], reach[0], rtol=1e-5)
                    assert float(getattr(new, end)) == round(float(getattr(new, end)))
                codes = float(new.qmax - new.qmin) + 1
                if 2**bits <= float(old.qmax - old.qmin) + 1:
                    assert jax.tree.map(float, new.qmax) == float(old.qmax)
                else:
                    assert 2**bits / 1.6 < codes < 1.6 * 2**bits


def test_unknown_methods_and_formats_that_do_not_fit():
    qparams = {"a": {"activations": grid.from_range(0.0, 1.0, 8, format="fp8_e4m3")}}
    with pytest.raises(ValueError, match=r"unknown method.*'lsk'.*'lsq'"):
        quantize.prepare({}, qparams, "lsk")
    with pytest.raises(ValueError, match=r"'lsq_plus' at a/activations: only grids of integers"):
        quantize.prepare({}, qparams, "lsq_plus")
    block = {"a": {"weights": grid.from_range(-jnp.ones((2, 3)), 1.0, 8, format="mxfp4")}}
    with pytest.raises(ValueError, match="already are 'e8m0'"):
        quantize.prepare({}, block, "tqt")


def test_batch_norm_keeps_its_statistics_when_frozen():
    model = build("cnn", num_classes=3, widths=(4, 4), batch_norm=True)
    images = jnp.asarray(RNG.normal(size=(8, 6, 6, 1)), jnp.float32)
    variables = model.init(jax.random.key(0), images, train=False)
    assert list_layers(model, variables, images)
    run = lambda **kw: quantize.apply(
        model, variables, {}, images, train=True, mutable=["batch_stats"], **kw
    )
    (free, moved), (frozen, kept) = run(), run(freeze_norm=True)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])
    np.testing.assert_array_equal(frozen, model.apply(variables, images, train=False))
    assert not np.allclose(free, frozen)
    assert not np.allclose(
        moved["batch_stats"]["norm_0"]["mean"], variables["batch_stats"]["norm_0"]["mean"]
    )
