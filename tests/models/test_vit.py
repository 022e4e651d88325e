"""The vision transformer against its formulas in loops, and what quantization sees of it."""

import math

import jax
import numpy as np
import pytest

from kdq import models, quantize

PATCH, WIDTH, HEADS = 2, 6, 2
MODEL = models.build(
    "vit", num_classes=3, patch=PATCH, width=WIDTH, depth=2, heads=HEADS, mlp_width=5
)
IMAGES = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    """Random numbers in every parameter: as initialized, biases and norms would hide mistakes."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def _norm(p, x):
    rows = []
    for row in x:
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        rows.append((row - mean) / math.sqrt(variance + 1e-6) * p["scale"] + p["bias"])
    return np.array(rows)


def _gelu(x):
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x / 2 * (1 + np.tanh(inner))


def _attention(p, x):
    out = np.tile(p["out"]["bias"], (len(x), 1))
    for h in range(HEADS):
        query, key, value = (
            x @ p[name]["kernel"][:, h] + p[name]["bias"][h] for name in ("query", "key", "value")
        )
        for i in range(len(x)):
            weights = np.array([math.exp(query[i] @ k / math.sqrt(WIDTH / HEADS)) for k in key])
            mixed = sum(w * v for w, v in zip(weights / weights.sum(), value, strict=True))
            out[i] += mixed @ p["out"]["kernel"][h]
    return out


def _logits(params, image):
    """One image [height, width, channels] through the paper's equations 1 to 4, with a mean."""
    tokens = []
    for top in range(0, image.shape[0], PATCH):
        for left in range(0, image.shape[1], PATCH):
            patch = image[top : top + PATCH, left : left + PATCH]
            kernel, bias = params["patches"]["kernel"], params["patches"]["bias"]
            tokens.append([(patch * kernel[..., c]).sum() + bias[c] for c in range(WIDTH)])
    x = np.array(tokens) + params["positions"]["table"]
    for b in range(2):
        p = params[f"block_{b}"]
        x = x + _attention(p["attention"], _norm(p["norm_0"], x))
        hidden = _norm(p["norm_1"], x) @ p["dense_0"]["kernel"] + p["dense_0"]["bias"]
        x = x + _gelu(hidden) @ p["dense_1"]["kernel"] + p["dense_1"]["bias"]
    return _norm(params["norm"], x).mean(0) @ params["head"]["kernel"] + params["head"]["bias"]


def test_the_forward_pass_is_the_papers(variables):
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables["params"])
    want = [_logits(params, image.astype(np.float64)) for image in IMAGES]
    np.testing.assert_allclose(MODEL.apply(variables, IMAGES), want, rtol=1e-4, atol=1e-4)


def test_quantization_sees_every_product_and_leaves_norms_and_positions(variables):
    layers = quantize.list_layers(MODEL, variables, IMAGES)
    attention = [f"attention/{name}" for name in ("query", "key", "value", "qk", "av", "out")]
    blocks = [f"block_{b}/{name}" for b in range(2) for name in (*attention, "dense_0", "dense_1")]
    assert list(layers) == ["patches", *blocks, "head"]
    tokens = (4 // PATCH) * (6 // PATCH)
    assert layers["patches"].macs == tokens * PATCH * PATCH * 3 * WIDTH
    assert layers["block_0/attention/qk"].macs == tokens * tokens * WIDTH
    assert layers["block_1/attention/av"].macs == tokens * tokens * WIDTH
    assert layers["block_1/dense_0"].macs == tokens * WIDTH * 5
    others = ["positions", "norm", *(f"block_{b}/norm_{n}" for b in range(2) for n in range(2))]
    assert sorted(quantize.list_unquantized(MODEL, variables, IMAGES)) == sorted(others)


def test_quantizers_reach_the_products_of_attention(variables):
    rules = (
        quantize.QuantizationRule(
            path=".*/(qk|av)",
            activations=quantize.TensorSpec(bits=2, granularity="per_tensor"),
        ),
    )
    qparams = quantize.calibrate(MODEL, variables, rules, [IMAGES])
    assert [sorted(one) for one in qparams.values()] == [["activations", "other"]] * 4
    changed = quantize.apply(MODEL, variables, qparams, IMAGES)
    assert not np.allclose(changed, MODEL.apply(variables, IMAGES), atol=1e-2)


def test_patches_that_do_not_divide_the_image_are_an_error(variables):
    with pytest.raises(ValueError, match="patches of 2×2 do not divide images of 4×5"):
        MODEL.apply(variables, IMAGES[:, :, :5])
