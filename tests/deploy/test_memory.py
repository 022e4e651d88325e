"""Memory by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from networks import lowered

from kdq import quantize
from kdq.deploy import lower
from kdq.deploy.measure import memory
from kdq.quantize.network import Weights


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(3, use_bias=False, name="a")(x))
        return nn.Dense(2, use_bias=False, name="b")(x)


def test_activations_by_hand():
    model, x = Two(), jnp.arange(20.0).reshape(5, 4)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    integer, _ = lowered(model, variables, x, quantize.uniform_rules(8, 8))
    # 4 floats and their codes; 3 codes and 2 sums; 2 sums and 2 floats.
    assert memory.activation_bytes(integer, x) == max(16 + 4, 4 + 3, 3 + 8, 8 + 8)
    floats = lower(model, Weights(variables=variables, qparams={}), x)
    # 4 and 3 floats; 3 and their maxima with 0; 3 and 2.
    assert memory.activation_bytes(floats, x) == 16 + 12


def test_weights_by_hand():
    model, x = Two(), jnp.arange(20.0).reshape(5, 4)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert memory.weight_bytes(lower(model, Weights(variables=variables, qparams={}), x)) == 4 * (
        12 + 6
    )
    bytes_of = {}
    for bits in (8, 4, 2):
        integer, _ = lowered(model, variables, x, quantize.uniform_rules(bits, 8))
        bytes_of[bits] = memory.weight_bytes(integer)
    assert bytes_of[8] - bytes_of[4] == 18 * 4 / 8
    assert bytes_of[4] - bytes_of[2] in (4, 5)  # 4.5, each rounded up


def test_what_is_used_again_stays_alive():
    class Residual(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + jnp.tanh(jnp.exp(x))

    model, x = Residual(), jnp.ones((2, 10))
    integer = lower(model, Weights(variables={"params": {}}, qparams={}), x)
    assert memory.activation_bytes(integer, x) == 3 * 40  # x, exp(x), tanh(exp(x))
