"""The layer list against shapes and multiply-accumulates counted by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdq.quantize import Inputs, LayerInfo, list_layers


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="unused_order_b")(x)
        return nn.LayerNorm()(x)


class Mixed(nn.Module):
    """Every way in which a layer is met: strided, grouped, on 3-D input, nested, shared, folded."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), strides=2)(x)  # 9x9 -> 5x5
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Conv(16, (3, 1), feature_group_count=4, padding="VALID")(x)  # 5x5 -> 3x5
        x = x.reshape(x.shape[0], -1, 16)
        x = Inner(name="inner")(x)
        shared = nn.Dense(5, name="shared")
        x = shared(shared(x).mean(1))
        x = jnp.stack([x, x, x], axis=1).reshape(-1, 5)  # leading axis: 3 * batch
        return nn.Dense(7, use_bias=False, name="folded")(x)


EXPECTED = {
    # 5*5 positions, a 3*3 window over 3 inputs, 8 outputs
    "Conv_0": ("Conv", (3, 3, 3, 8), (2, 9, 9, 3), (2, 5, 5, 8), 5 * 5 * 9 * 3 * 8),
    # a group sees 2 of the 8 inputs
    "Conv_1": ("Conv", (3, 1, 2, 16), (2, 5, 5, 8), (2, 3, 5, 16), 3 * 5 * 3 * 2 * 16),
    "inner/unused_order_b": ("Dense", (16, 5), (2, 15, 16), (2, 15, 5), 15 * 16 * 5),
    # first on 15 positions, then on their mean; the shapes are those of the first call
    "shared": ("Dense", (5, 5), (2, 15, 5), (2, 15, 5), 15 * 5 * 5 + 5 * 5),
    "folded": ("Dense", (5, 7), (6, 5), (6, 7), 3 * 5 * 7),
}


def _shapes(batch, side=9):
    image = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: Mixed().init(jax.random.key(0), x, True), image)
    return variables, image


def test_layers_in_order_with_shapes_and_macs_counted_by_hand():
    variables, image = _shapes(2)
    layers = list_layers(Mixed(), variables, image)
    assert list(layers) == list(EXPECTED)
    for path, (kind, weight_shape, input_shape, output_shape, macs) in EXPECTED.items():
        assert layers[path] == LayerInfo(
            path=path,
            kind=kind,
            weight_name="kernel",
            weight_shape=weight_shape,
            input_shape=input_shape,
            output_shape=output_shape,
            macs=macs,
        )
    assert layers["Conv_1"].weight_count == 3 * 1 * 2 * 16


def test_arrays_and_shapes_tell_the_same():
    variables, image = _shapes(2)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (variables, image))
    expected = list_layers(Mixed(), variables, image)
    assert list_layers(Mixed(), *zeros) == expected


@pytest.mark.parametrize("batch", [1, 3, 10**9])
def test_macs_are_those_of_one_example_and_nothing_is_computed(batch):
    """A billion examples would not fit, let alone be convolved."""
    variables, image = _shapes(batch)
    layers = list_layers(Mixed(), variables, image)
    assert [v.macs for v in layers.values()] == [v[-1] for v in EXPECTED.values()]


def test_macs_are_the_flops_that_the_compiler_counts():
    """XLA's own count of a model of products alone: two operations a multiply-accumulate."""

    class Products(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (2, 2), strides=(2, 1), padding="VALID", use_bias=False)(x)
            return nn.Dense(10, use_bias=False)(x.reshape(x.shape[0], -1))

    model, x = Products(), jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    cost = jax.jit(model.apply).lower(variables, x).compile().cost_analysis()
    macs = sum(layer.macs for layer in list_layers(model, variables, x).values())
    assert cost["flops"] == pytest.approx(2 * 4 * macs, rel=0.01)


def test_several_arguments_and_a_model_that_is_one_layer():
    class Sum(nn.Module):
        @nn.compact
        def __call__(self, a, b):
            return nn.Dense(2, name="a")(a) + nn.Dense(2, name="b")(b)

    inputs = (jnp.ones((3, 4)), jnp.ones((3, 6)))
    variables = jax.jit(Sum().init)(jax.random.key(0), *inputs)
    layers = list_layers(Sum(), variables, inputs)
    assert {p: v.weight_shape for p, v in layers.items()} == {"a": (4, 2), "b": (6, 2)}
    dense = nn.Dense(2)
    layers = list_layers(dense, jax.jit(dense.init)(jax.random.key(0), inputs[0]), inputs[0])
    assert {p: v.macs for p, v in layers.items()} == {"": 8}


TRACES = []


class Scaled(nn.Module):
    scale: Any  # Python can hash a number, and no array

    @nn.compact
    def __call__(self, x, wide=False):
        TRACES.append(x.shape)
        return nn.Dense(6 if wide else 3, name="dense")(x * self.scale)


@pytest.mark.parametrize(("scale", "traces"), [(2.0, 1), (np.ones(4), 2)])
def test_a_model_is_traced_once_for_each_shape_and_argument(scale, traces):
    model, inputs = Scaled(scale), jnp.ones((1, 4))
    narrow, wide = (
        jax.eval_shape(lambda x, w=w: model.init(jax.random.key(0), x, w), inputs)
        for w in (False, True)
    )
    TRACES.clear()
    list_layers(model, narrow, inputs).clear()  # the caller's own
    found = list_layers(model, narrow, inputs)
    assert found["dense"].weight_shape == (4, 3)
    assert len(TRACES) == traces
    assert list_layers(model, wide, Inputs(inputs, wide=True))["dense"].weight_shape == (4, 6)
    assert list_layers(model, narrow, jnp.ones((1, 7, 4)))["dense"].macs == 7 * 12
