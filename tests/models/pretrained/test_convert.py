"""Arrays in PyTorch's names and layouts become the variables of a Flax network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.models.pretrained import ConversionError, convert

IMAGE = jnp.zeros((1, 5, 5, 2))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Conv(4, (3, 3), feature_group_count=2, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def tensors():
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    return {
        "features.0.weight": draw(4, 1, 3, 3),
        "features.0.bias": draw(4),
        "features.1.weight": draw(4),
        "features.1.bias": draw(4),
        "features.1.running_mean": draw(4),
        "features.1.running_var": np.abs(draw(4)) + 0.5,
        "features.1.num_batches_tracked": np.array(3),
        "classifier.weight": draw(3, 4),
        "classifier.bias": draw(3),
    }


RULES = ((r"^features\.0\.", "conv."), (r"^features\.1\.", "norm."), (r"^classifier\.", "head."))


def by_hand(arrays, image):
    """The network's logits in NumPy and float64, in PyTorch's layouts."""
    x = np.pad(np.asarray(image, np.float64), ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((5, 5, 4))
    for channel in range(4):
        group = channel // 2  # two groups of one input channel
        for i in range(5):
            for j in range(5):
                window = x[i : i + 3, j : j + 3, group]
                out[i, j, channel] = (window * arrays["features.0.weight"][channel, 0]).sum()
    out += arrays["features.0.bias"]
    norm = lambda part: arrays[f"features.1.{part}"]
    out = (out - norm("running_mean")) / np.sqrt(norm("running_var") + 1e-5)
    out = out * norm("weight") + norm("bias")
    return arrays["classifier.weight"] @ out.mean((0, 1)) + arrays["classifier.bias"]


def test_the_network_computes_what_the_arrays_computed():
    variables = convert(Net(), IMAGE, tensors(), RULES)
    image = jax.random.normal(jax.random.key(0), (5, 5, 2))
    logits = Net().apply(variables, image[None])[0]
    np.testing.assert_allclose(logits, by_hand(tensors(), image), rtol=1e-5, atol=1e-6)


def test_a_rule_of_none_leaves_arrays_out():
    more = tensors() | {"auxiliary.weight": np.zeros(3)}
    variables = convert(Net(), IMAGE, more, (*RULES, (r"^auxiliary", None)))
    assert set(variables) == {"params", "batch_stats"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.weight": np.zeros(3)}, r"no place for: extra.weight \(3,\)"),
        ({"classifier.bias": None}, r"nothing fills: params/head/bias \(3,\)"),
        ({"classifier.weight": np.zeros((4, 4))}, r"another shape: classifier.weight \(4, 4\) for"),
        ({"head.bias": np.zeros(3)}, "params/head/bias has been filled from another array"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arrays = {k: v for k, v in (tensors() | change).items() if v is not None}
    with pytest.raises(ConversionError, match=message):
        convert(Net(), IMAGE, arrays, RULES)
