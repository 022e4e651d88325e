"""Mobile networks have the parameters and the layers that were published."""

import jax
import jax.numpy as jnp
import pytest

from kdq import models

# torchvision's and the authors' counts, of 1000 classes.
PUBLISHED = {
    ("mobilenet", "version", "v2"): 3_504_872,
    ("mobilenet", "version", "v3_large"): 5_483_032,
    ("mobilenet", "version", "v3_small"): 2_542_856,
    ("efficientnet", "variant", "b0"): 5_288_548,
    ("efficientnet", "variant", "lite0"): 4_652_008,
    ("efficientnet", "variant", "lite1"): 5_416_680,
    ("efficientnet", "variant", "lite2"): 6_092_072,
    ("efficientnet", "variant", "lite3"): 8_197_096,
    ("efficientnet", "variant", "lite4"): 13_006_568,
}


def shapes(model, size=224):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


@pytest.mark.parametrize(("name", "field", "value"), PUBLISHED)
def test_parameters_are_as_many_as_published(name, field, value):
    variables = shapes(models.build(name, num_classes=1000, **{field: value}))
    assert models.count_parameters(variables) == PUBLISHED[name, field, value]


def test_half_as_wide_v2_has_the_published_parameters():
    model = models.build("mobilenet", num_classes=1000, version="v2", width_multiplier=0.5)
    assert models.count_parameters(shapes(model)) == 1_968_680


@pytest.mark.parametrize("padding", ["SAME", "symmetric"])
def test_strides_halve_odd_images_upwards(padding):
    model = models.build("mobilenet", num_classes=5, padding=padding)
    images = jax.ShapeDtypeStruct((2, 35, 35, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    run = lambda variables, x: model.apply(variables, x, capture_intermediates=True)
    logits, state = jax.eval_shape(run, variables, images)
    assert logits.shape == (2, 5)
    sizes = [state["intermediates"][f"block_{i}"]["__call__"][0].shape[1] for i in (0, 1, 3, 6, 13)]
    assert sizes == [18, 9, 5, 3, 2]


def test_training_updates_statistics_and_drops_out():
    model = models.build("mobilenet", num_classes=3, version="v3_small", width_multiplier=0.25)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    variables = model.init(jax.random.key(0), images)

    @jax.jit
    def train(variables, key):
        return model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )

    (first, state), (second, _) = (train(variables, jax.random.key(k)) for k in (0, 1))
    assert not jnp.allclose(first, second)
    moved = jax.tree.map(
        lambda a, b: jnp.any(a != b), state["batch_stats"], variables["batch_stats"]
    )
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mobilenet", {"version": "v4"}, "unknown version 'v4'; valid: v2"),
        ("mobilenet", {"padding": "valid"}, "unknown padding 'valid'"),
        ("mobilenet", {"width_multiplier": 0.0}, "expected a positive width_multiplier"),
        ("efficientnet", {"variant": "lite9"}, "unknown variant 'lite9'; valid: b0"),
    ],
)
def test_unknown_networks_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, num_classes=2, **fields)
