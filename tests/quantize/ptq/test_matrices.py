"""Patches times matrix is what the layer computes, for every kind and every sort of padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kdq.quantize import list_layers
from kdq.quantize.kinds import Unsupported
from kdq.quantize.ptq import matrices

LAYERS = {
    "dense": (nn.Dense(5), (2, 3, 4)),
    "general": (nn.DenseGeneral((2, 3), axis=(1, -1)), (2, 4, 3, 5)),
    "general of a batch": (nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), (2, 4, 5)),
    "strided": (nn.Conv(6, (3, 2), strides=(2, 1)), (2, 7, 6, 4)),
    "dilated": (nn.Conv(6, (3, 3), kernel_dilation=2, padding="VALID"), (2, 7, 7, 4)),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), (2, 5, 5, 4)),
    "depthwise": (nn.Conv(8, (3, 3), feature_group_count=4, strides=2), (2, 5, 5, 4)),
    "circular": (nn.Conv(3, (3,), padding="CIRCULAR"), (2, 6, 4)),
    "causal": (nn.Conv(3, (3,), padding="CAUSAL"), (2, 6, 4)),
    "transposed": (nn.ConvTranspose(3, (3, 3), strides=(2, 2)), (2, 4, 4, 5)),
    "swapped": (nn.ConvTranspose(3, (2, 3), strides=(2, 1), transpose_kernel=True), (2, 4, 4, 5)),
    "einsum": (nn.Einsum((4, 2, 3), "...sd,dhk->...shk"), (2, 5, 4)),
    "einsum of heads": (nn.Einsum((6, 2, 3), "bshk,dhk->bshd"), (2, 5, 2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_product_and_its_factors_are_those_of_the_layer(name):
    """Weights times factors of channels do what inputs, or outputs, times the factors do."""
    module, shape = LAYERS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    layer = list_layers(module, variables, x)[""]
    form = matrices.form(layer)
    kernel = rng.normal(size=layer.weight_shape).astype(np.float32)
    factors = rng.uniform(0.5, 2, form.size(form.channels)).astype(np.float32)
    outputs = (*form.groups, *form.outputs)
    out_factors = rng.uniform(0.5, 2, form.size(outputs)).astype(np.float32)

    def ours(kernel, x):
        matrix = matrices.to_matrix(kernel, form)
        scaled = matrices.scaled(kernel, form, form.channels, factors)
        made = matrices.scaled(kernel, form, outputs, out_factors)
        back = matrices.from_matrix(matrix, form, kernel.shape)
        reach = matrices.reach(kernel, form, outputs)
        layers = module.clone(use_bias=False)
        run = lambda kernel, x: layers.apply({"params": {"kernel": kernel}}, x)
        rows = matrices.patches(layer, x)
        return (
            rows,
            matrix,
            back,
            reach,
            run(kernel, x),
            run(scaled, x),
            run(made, x),
            run(kernel, x * whole),
        )

    # The factors where the input has these channels.
    sizes = [shape[axis] for axis in form.input_axes]
    whole = factors.reshape(*sizes, *[1] * (len(shape) - len(sizes)))
    whole = np.moveaxis(whole, range(len(sizes)), form.input_axes)
    rows, matrix, back, reach, plain, scaled, made, inputs_scaled = jax.tree.map(
        lambda a: np.asarray(a, np.float64), jax.jit(ours)(kernel, x)
    )
    product = np.einsum("gsi,gio->gso", rows, matrix)
    # Where a sample or an output is does not matter; a wrong pairing of inputs and weights does.
    np.testing.assert_allclose(np.sort(product.ravel()), np.sort(plain.ravel()), atol=2e-5)
    np.testing.assert_array_equal(back, kernel)
    np.testing.assert_allclose(scaled, inputs_scaled, atol=2e-5)
    if layer.kind in ("Dense", "Conv", "ConvTranspose"):  # one axis of outputs, and the last
        np.testing.assert_allclose(made, plain * out_factors, atol=2e-5)
        columns = np.moveaxis(kernel, layer.channel_axes[0], 0)
        largest = np.abs(columns).reshape(len(out_factors), -1).max(1)
        np.testing.assert_allclose(reach, largest, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (nn.Einsum((4, 3), "bsd,de->be"), (2, 5, 4), "no matrix product"),
        (nn.Conv(3, (3,), mask=jnp.ones((3, 4, 3))), (2, 5, 4), "masked"),
    ],
)
def test_what_is_no_product_says_why(module, shape, reason):
    x = jnp.ones(shape)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    layer = list_layers(module, variables, x)[""]
    with pytest.raises(Unsupported, match=reason):
        matrices.form(layer)
