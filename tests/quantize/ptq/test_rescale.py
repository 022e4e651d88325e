"""Which channels can be rescaled, against what is known of small models by their construction."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.quantize.ptq.channels import rescale
from kdq.quantize.ptq.rescale import find_rescalings


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        h = nn.relu(nn.Dense(6, name="up")(x + h))
        return x + nn.Dense(4, name="down")(h), None


class Mixed(nn.Module):
    """ReLU, GELU, pooling, a depthwise and a grouped convolution, a residual, a scan, a reshape."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.gelu(nn.Conv(4, (1, 1), feature_group_count=2, name="grouped")(x))
        x = x + nn.Conv(4, (1, 1), name="residual")(x)
        x = x.reshape(x.shape[0], -1, 4)
        body = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = body(name="layers")(x, None)
        x = nn.leaky_relu(nn.Dense(3, name="few")(x)).reshape(x.shape[0], -1)
        return nn.Dense(2, name="head")(x)


def _model(model, shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(seed), x)
    rng = np.random.default_rng(seed + 1)
    noise = lambda a: (np.asarray(a) + 0.1 * rng.normal(size=a.shape)).astype(np.float32)
    return jax.tree.map(noise, variables), x


@pytest.mark.slow
def test_what_can_be_rescaled_is_found_and_nothing_else():
    model = Mixed()
    variables, x = _model(model, (6, 4, 4, 3))
    found = find_rescalings(model, variables, x)
    channels = {
        pair.producer.path: {c.layer.path: c.channel.tolist() for c in pair.consumers}
        for pair in found
    }
    four, layers = [0, 1, 2, 3], [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert channels == {
        "first": {"depthwise": four},
        "depthwise": {"grouped": four},
        "layers/norm": {f"layers/attention/{name}": layers for name in ("query", "key", "value")},
        "layers/attention/value": {"layers/attention/out": layers},
        "layers/up": {"layers/down": [list(range(6)), list(range(6, 12))]},
        "few": {"head": [0, 1, 2] * 4},  # of four positions
    }
    # All at once, by factors of up to a hundred, on inputs that the search has not seen.
    rng = np.random.default_rng(5)
    changed = variables
    for pair in found:
        changed = rescale(changed, pair, 10.0 ** rng.uniform(-1, 1, pair.producer.factors))
    run = jax.jit(model.apply)
    other = rng.normal(size=x.shape).astype(np.float32)
    expected = run(variables, other)
    np.testing.assert_allclose(run(changed, other), expected, atol=1e-5 * np.abs(expected).max())
    kernels = [np.asarray(v["params"]["first"]["kernel"]) for v in (variables, changed)]
    ratio = kernels[1] / kernels[0]
    assert np.ptp(ratio, axis=(0, 1, 2)).max() < 1e-5 * ratio.max()
    assert np.log10(ratio.max() / ratio.min()) > 0.5


class Clipped(nn.Module):
    """What clips far out is no ReLU."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="first")(x)
        return nn.Dense(2, name="second")(jnp.minimum(nn.relu(x), 6.0))


def test_what_the_batch_hides_is_still_seen():
    """A channel that a ReLU shuts off is one of the channels; a clip is met by what is large."""

    class Relu(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="second")(nn.relu(nn.Dense(3, name="first")(x)))

    variables, x = _model(Relu(), (8, 4))
    variables["params"]["first"]["bias"][1] = -100.0
    (pair,) = find_rescalings(Relu(), variables, x)
    assert pair.consumers[0].channel.tolist() == [0, 1, 2]
    variables, x = _model(Clipped(), (8, 4))
    variables["params"]["first"]["kernel"] *= 5.0
    assert find_rescalings(Clipped(), variables, x) == ()


def test_two_readers_of_which_one_can_not_take_the_factor_back():
    class Fork(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="shared")(x)
            return nn.Dense(2, name="a")(nn.relu(x)) + nn.Dense(2, name="b")(nn.tanh(x))

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="shared")(x)
            return nn.Dense(2, name="a")(nn.relu(x)) + nn.Dense(2, name="b")(x[..., ::-1])

    class Out(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="shared")(x)
            return nn.Dense(2, name="a")(nn.relu(x)), x

    found = {}
    for model in (Fork(), Both(), Out()):
        found[type(model)] = find_rescalings(model, *_model(model, (8, 4)))
    assert found[Fork] == found[Out] == ()
    readers = {c.layer.path: c.channel.tolist() for c in found[Both][0].consumers}
    assert readers == {"a": [0, 1, 2, 3], "b": [3, 2, 1, 0]}


def test_nan_is_refused():
    variables, x = _model(Clipped(), (8, 4))
    with pytest.raises(ValueError, match="NaN or infinity in the input of layer 'first'"):
        find_rescalings(Clipped(), variables, np.full_like(x, np.nan))
