"""Forms of a convolution on this device: forward, and the gradients of images and kernel.

    python benchmarks/convolutions.py --out=benchmarks/results/convolutions_PROCESSOR.json

XLA's own, against matrix products for all of it or for the gradient of the kernel alone: one of
patches (im2col), one for each row of the window, one for each of its positions. And what
kdq.train.convolution makes of it. All take turns.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from interleaved import publish, run, show, take_turns
from jax import lax

from kdq.train.convolution import convolve

OUT = flags.DEFINE_string("out", None, "JSON file for the figures; printed only if not given.")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed rounds of each shape.")

NUMBERS = ("NHWC", "HWIO", "NHWC")
# batch, size, channels, features, stride, window
SHAPES = (
    (64, 8, 1, 32, 1, 3),
    (256, 28, 1, 8, 1, 3),
    (64, 32, 3, 16, 1, 3),
    (64, 8, 32, 64, 1, 3),
    (64, 4, 64, 128, 1, 3),
    (256, 28, 16, 16, 1, 3),
    (256, 28, 32, 32, 1, 3),
    (256, 14, 32, 32, 1, 3),
    (256, 14, 64, 64, 1, 3),
    (64, 8, 8, 16, 2, 3),
    (64, 4, 16, 16, 2, 3),
    (256, 28, 8, 16, 2, 3),
    (256, 28, 16, 32, 2, 3),
    (256, 14, 16, 32, 2, 3),
    (256, 14, 32, 64, 2, 3),
    (256, 7, 64, 64, 1, 3),
    (256, 7, 64, 128, 2, 3),
    (256, 4, 128, 128, 1, 3),
    (128, 32, 16, 16, 1, 3),
    (32, 56, 64, 64, 1, 3),
    (256, 28, 16, 32, 2, 1),
    (256, 14, 32, 64, 2, 1),
    (256, 14, 32, 32, 1, 1),
)


def native(images, kernel, stride):
    """XLA's."""
    strides = (stride, stride)
    return lax.conv_general_dilated(images, kernel, strides, "SAME", dimension_numbers=NUMBERS)


def ours(images, kernel, stride):
    """kdq's."""
    return convolve(
        images,
        kernel,
        (stride, stride),
        "SAME",
        lhs_dilation=(1, 1),
        rhs_dilation=(1, 1),
        dimension_numbers=lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),
        feature_group_count=1,
        precision=None,
    )


def patches(images, window, stride):
    """Returns the pixels at each place of a window: window² [batch, height, width, channels]."""
    size = images.shape[1]
    outputs = -(-size // stride)
    lack = max((outputs - 1) * stride + window - size, 0)
    pads = (lack // 2, lack - lack // 2)
    padded = jnp.pad(images, ((0, 0), pads, pads, (0, 0)))
    span = (outputs - 1) * stride + 1
    return [
        padded[:, i : i + span : stride, j : j + span : stride]
        for i in range(window)
        for j in range(window)
    ]


def products(images, kernel, stride):
    """Patches times the kernel."""
    return times(jnp.concatenate(patches(images, kernel.shape[0], stride), -1), kernel)


def times(seen, kernel):
    """As matrices."""
    product = seen.reshape(-1, seen.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return product.reshape(*seen.shape[:-1], kernel.shape[-1])


def summed(left, right):
    """Returns the sum for each pair of channels and features, as matrices."""
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def whole(images, outer, kernel, stride):
    """Gradient of the kernel: patches of all images, transposed, times that of the output."""
    seen = jnp.concatenate(patches(images, kernel.shape[0], stride), -1)
    return summed(seen, outer).reshape(kernel.shape)


def by_row(images, outer, kernel, stride):
    """The same, one row of the window after another."""
    window = kernel.shape[0]
    seen = patches(images, window, stride)
    rows = [jnp.concatenate(seen[i : i + window], -1) for i in range(0, window**2, window)]
    return jnp.stack([summed(row, outer) for row in rows]).reshape(kernel.shape)


def by_position(images, outer, kernel, stride):
    """The same, one position of the window after another."""
    seen = patches(images, kernel.shape[0], stride)
    return jnp.stack([summed(pixels, outer) for pixels in seen]).reshape(kernel.shape)


def with_gradient(of_kernel):
    """XLA's convolution with another gradient of the kernel."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def form(images, kernel, stride):
        return native(images, kernel, stride)

    def forward(images, kernel, stride):
        return native(images, kernel, stride), (images, kernel)

    def backward(stride, kept, outer):
        images, kernel = kept
        (of_images,) = jax.vjp(lambda x: native(x, kernel, stride), images)[1](outer)
        return of_images, of_kernel(images, outer, kernel, stride)

    form.defvjp(forward, backward)
    return form


FORMS = {
    "xla": native,
    "kdq": ours,
    "patches": products,
    "xla, kernel's gradient by patches": with_gradient(whole),
    "xla, kernel's gradient by row": with_gradient(by_row),
    "xla, kernel's gradient by position": with_gradient(by_position),
}


def main(_: list[str]) -> None:
    figures = {}
    for shape in SHAPES:
        batch, size, channels, features, stride, window = shape
        rng = np.random.default_rng(0)
        draw = lambda *dims: jnp.asarray(rng.normal(size=dims), jnp.float32)  # noqa: B023
        images = draw(batch, size, size, channels)
        kernel = draw(window, window, channels, features) / window
        outer = draw(batch, -(-size // stride), -(-size // stride), features)
        steps, expected = {}, None
        for name, form in FORMS.items():

            def step(images, kernel, outer, form=form, stride=stride):
                value, pull = jax.vjp(lambda x, k: form(x, k, stride), images, kernel)
                return value, pull(outer)

            steps[name] = functools.partial(jax.jit(step), images, kernel, outer)
            results = jax.device_get(steps[name]())
            expected = expected or results
            for result, other in zip(
                jax.tree.leaves(results), jax.tree.leaves(expected), strict=True
            ):
                np.testing.assert_allclose(
                    result, other, rtol=1e-3, atol=1e-3 * np.abs(other).max()
                )
        title = f"{batch}x{size}x{size}, {channels} to {features}, {window}x{window}, by {stride}"
        figures[title] = take_turns(steps, "xla", rounds=ROUNDS.value)
        show(title, figures[title])
    publish(figures, OUT.value)


if __name__ == "__main__":
    run(main)
