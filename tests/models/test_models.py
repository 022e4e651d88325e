"""`kdq.models.build`, and what every model promises to its callers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq import models

IMAGES = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
ALL = {
    "cnn": {"batch_norm": True},
    "efficientnet": {"variant": "b0"},
    "mlp": {"widths": (8,)},
    "mobilenet": {"version": "v3_small", "width_multiplier": 0.25},
    "resnet": {"depth": 8, "widths": (4, 4, 8, 8)},
    "vit": {"width": 8, "depth": 1, "heads": 2},
    "wide_resnet": {"depth": 10, "width_multiplier": 1},
}


def _variables(model):
    """Random variables; drawn here, because compiling the initializers takes seconds a model."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        positive = path[-1].key in ("scale", "var")
        return jnp.asarray(1 + 0.1 * np.abs(noise) if positive else noise, leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    return jax.tree_util.tree_map_with_path(draw, shapes)


DEFAULT = ("cnn", "resnet")


@pytest.fixture(
    params=[pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in sorted(ALL)],
    scope="module",
)
def model_and_variables(request):
    model = models.build(request.param, num_classes=5, **ALL[request.param])
    return model, _variables(model)


def test_every_module_of_the_package_is_tested_here():
    assert models.names() == sorted(ALL)


@pytest.mark.slow
def test_training_moves_batch_statistics_and_evaluation_does_not(model_and_variables):
    model, variables = model_and_variables
    streams = {"dropout": jax.random.key(2)}
    _, trained = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"], rngs=streams)
    _, evaluated = model.apply(variables, IMAGES, train=False, mutable=["batch_stats"])
    before = variables.get("batch_stats", {})
    jax.tree.map(np.testing.assert_array_equal, before, evaluated.get("batch_stats", {}))
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves(trained.get("batch_stats", {})), strict=True
    ):
        assert not np.allclose(old, new)


def test_evaluation_of_an_image_ignores_the_rest_of_the_batch(model_and_variables):
    model, variables = model_and_variables
    np.testing.assert_allclose(
        model.apply(variables, IMAGES, train=False)[:1],
        model.apply(variables, IMAGES[:1], train=False),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "name", ["cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(ALL) if n != "cnn")]
)
def test_half_precision_keeps_parameters_and_logits_in_float32(name):
    model = models.build(name, num_classes=5, dtype="bfloat16", **ALL[name])
    variables = _variables(model)
    logits = model.apply(variables, IMAGES, train=False)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    full = models.build(name, num_classes=5, **ALL[name]).apply(variables, IMAGES, train=False)
    assert not np.array_equal(logits, full)
    np.testing.assert_allclose(logits, full, atol=0.05 * float(jnp.abs(full).max()))


def test_lists_become_tuples_so_that_a_model_can_be_a_static_argument():
    listed = models.build("cnn", num_classes=10, widths=[4, 8], strides=[1, 2])
    assert hash(listed) == hash(models.build("cnn", num_classes=10, widths=(4, 8), strides=(1, 2)))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "resnt",
            {},
            r"unknown model 'resnt' \(did you mean 'resnet'\?\); valid: cnn, efficientnet, ",
        ),
        ("CNN.Model", {}, "unknown model"),
        (
            "cnn",
            {"num_classes": 2, "width": (4,)},
            r"'width' \(did you mean 'widths'\?\); valid: num_classes, widths",
        ),
        ("cnn", {"num_classes": 2, "parent": None}, "unknown field of model 'cnn': 'parent'"),
        ("mlp", {"widths": (4,)}, "model 'mlp' needs 'num_classes'"),
        ("resnet", {"num_classes": 2, "depth": 18}, "depth 18 is not 6n.2; valid: 8, 14, 20"),
        ("resnet", {"num_classes": 2, "depth": 2}, "valid: 8, 14, 20"),
        ("resnet", {"num_classes": 2, "widths": (16, 32)}, "4 numbers; given"),
        ("wide_resnet", {"num_classes": 2, "depth": 20}, "depth 20 is not 6n.4; valid: 10, 16"),
        ("wide_resnet", {"num_classes": 2, "width_multiplier": 0}, "at least 1, given 0"),
        ("vit", {"num_classes": 2, "width": 10}, "width must be a multiple of heads=4, given 10"),
        ("vit", {"num_classes": 2, "depth": 0}, "depth must be at least 1, given 0"),
        ("cnn", {"num_classes": 2, "strides": (1, 2)}, "one entry a convolution"),
        ("cnn", {"num_classes": 2, "strides": (1, 3, 1)}, "strides must be 1 or 2"),
        ("cnn", {"num_classes": 2, "pool": -0.5}, "pool=-0.5: expected bool"),
        ("cnn", {"num_classes": 2, "pool": 1}, "pool=1: expected bool"),
        ("cnn", {"num_classes": True}, "num_classes=True: expected int"),
        ("cnn", {"num_classes": 2.0}, "num_classes=2.0: expected int"),
    ],
)
def test_errors_name_what_was_given_and_what_is_valid(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, **kwargs)


def _parameters(name: str, channels: int = 3, **kwargs) -> int:
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    model = models.build(name, **kwargs)
    return models.count_parameters(jax.eval_shape(model.init, jax.random.key(0), image))


@pytest.mark.parametrize(
    ("name", "kwargs", "published"),
    [
        # arXiv:1512.03385 table 6 counts option A: ours adds the projections of two shortcuts, with
        # batch norm: (16·32 + 2·32) + (32·64 + 2·64) = 2,752.
        ("resnet", {"num_classes": 10, "depth": 20}, 269_722 + 2_752),
        ("resnet", {"num_classes": 10, "depth": 56}, 853_018 + 2_752),
        ("resnet", {"num_classes": 10, "depth": 110}, 1_727_962 + 2_752),
        # mdistiller's resnet8x4 and resnet32x4 for CIFAR-100, in that order.
        ("resnet", {"num_classes": 100, "depth": 8, "widths": (32, 64, 128, 256)}, 1_233_540),
        ("resnet", {"num_classes": 100, "depth": 32, "widths": (32, 64, 128, 256)}, 7_433_860),
        ("wide_resnet", {"num_classes": 100, "depth": 16}, 703_284),
        ("wide_resnet", {"num_classes": 100, "depth": 40}, 2_255_156),
        # arXiv:1605.07146 table 4: 36.5M.
        ("wide_resnet", {"num_classes": 10, "depth": 28, "width_multiplier": 10}, 36_479_194),
    ],
)
def test_parameters_are_the_published_ones(name, kwargs, published):
    assert _parameters(name, **kwargs) == published


def test_parameters_of_the_digits_student_and_of_an_mlp():
    convolutions = (9 * 1 * 8 + 8) + (9 * 8 * 16 + 16) + (9 * 16 * 16 + 16)
    assert _parameters("cnn", channels=1, num_classes=10) == convolutions + 16 * 10 + 10
    dense = (32 * 32 * 3 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 10 + 10)
    assert _parameters("mlp", num_classes=10) == dense
