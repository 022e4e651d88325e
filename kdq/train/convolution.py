"""Convolutions as XLA is fastest at them on a CPU, behind the ordinary `nn.Conv`.

A convolution is linear in its images and in its kernel, so the gradient of either is the transpose
of a form of it, and each of the three may be computed by another form.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdq.types import Array

MOST_BYTES = 1 << 28  # of what a form copies of the images


@contextlib.contextmanager
def fast_convolutions() -> Iterator[None]:
    """In this context, what is differentiated takes the fastest form of each convolution: on CPUs.

    Sums are taken in another order, no more. What that gains, by shape and machine, is in
    benchmarks/results/convolutions_*.json. Reverse mode only: forward-mode derivatives are errors.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    with nn.intercept_methods(_convolve):
        yield


def convolve(
    images: Array, kernel: Array, strides: Sequence[int], padding: Any, **options: Any
) -> Array:
    """`jax.lax.conv_general_dilated` as `nn.Conv` calls it, differentiated by the fastest forms.

    Of images [batch, ...positions, channels] and a kernel [...window, channels, features]; returns
    [batch, ...positions, features].
    """
    window = kernel.shape[:-2]
    dilations = (*options["lhs_dilation"], *options["rhs_dilation"])
    if options["feature_group_count"] > 1 or set(dilations) != {1}:
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **options)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:-1], window, strides, padding)
    how = _How(
        window,
        tuple(strides),
        tuple((int(low), int(high)) for low, high in padding),
        tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in options.items()),
    )
    forms = _fastest(how, images, kernel)
    if set(forms) == {_xla}:
        return _xla(how, images, kernel)
    return _by_forms(how, forms, images, kernel)


class _How(NamedTuple):
    """The static part of a convolution."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    options: tuple[tuple[str, Any], ...]  # further arguments of `conv_general_dilated`


Form = Callable[[_How, Array, Array], Array]


def _fastest(how: _How, images: Array, kernel: Array) -> tuple[Form, Form, Form]:
    """Returns the forms of the convolution, of its images' gradient and of its kernel's.

    By measurement on two processors. XLA is slow at one to three channels, at the gradient of the
    images of a strided convolution, most of which it multiplies by zeros, and at that of a kernel,
    whose "window" is a whole image.
    """
    *window, channels, features = kernel.shape
    strided = math.prod(how.strides) > 1
    outputs = math.prod(images.shape[:-1]) // math.prod(how.strides)
    many, grows = channels >= 32, features >= 2 * channels
    if any(side < 0 for pad in how.pads for side in pad):  # images that are cut
        return _xla, _xla, _xla
    if math.prod(window) == 1:
        forms = _patches, _patches, _patches
    elif channels < 4:
        forms = (_xla if strided else _patches), _xla, _patches
    elif many:
        of_images = _patches if strided or grows or channels >= 64 else _xla
        forms = (_patches if grows else _xla), of_images, _rows
    elif strided and channels >= 16:
        forms = _xla, _patches, _rows
    elif strided and outputs > 1 << 14:
        forms = _xla, _xla, _rows
    else:
        forms = _xla, _xla, _xla
    copies = {_xla: 0, _rows: math.prod(window[1:]), _patches: math.prod(window)}
    most = MOST_BYTES // (outputs * channels * images.dtype.itemsize)
    forward, of_images, of_kernel = (form if copies[form] <= most else _xla for form in forms)
    return forward, of_images, of_kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_forms(how: _How, forms: tuple[Form, Form, Form], images: Array, kernel: Array) -> Array:
    # Not differentiated, as in a teacher: XLA makes one piece of several layers, if they are its.
    return _xla(how, images, kernel)


def _forward(how, forms, images, kernel):
    # What the images come from is not to be computed anew for each copy of them.
    images = jax.lax.optimization_barrier(images)
    return forms[0](how, images, kernel), (images, kernel)


def _backward(how, forms, kept, outer):
    images, kernel = kept
    _, of_images, of_kernel = forms
    (images_bar,) = jax.linear_transpose(lambda x: of_images(how, x, kernel), images)(outer)
    (kernel_bar,) = jax.linear_transpose(lambda k: of_kernel(how, images, k), kernel)(outer)
    return images_bar, kernel_bar


_by_forms.defvjp(_forward, _backward)


def _xla(how: _How, images: Array, kernel: Array) -> Array:
    """Computes it as XLA does."""
    return jax.lax.conv_general_dilated(images, kernel, how.strides, how.pads, **dict(how.options))


def _patches(how: _How, images: Array, kernel: Array) -> Array:
    """Computes one product: of what each position of the output sees, with the kernel."""
    seen = jnp.concatenate(list(itertools.chain(*_seen(how, images))), axis=-1)
    return _product(how, seen, kernel)


def _rows(how: _How, images: Array, kernel: Array) -> Array:
    """Computes a product for each row of the window."""
    seen = [jnp.concatenate(row, axis=-1) for row in _seen(how, images)]
    products = [_product(how, row, part) for row, part in zip(seen, kernel, strict=True)]
    return functools.reduce(jnp.add, products)


def _product(how: _How, seen: Array, kernel: Array) -> Array:
    # Of matrices: XLA takes twice as long where the backward pass sums over several axes.
    rows = seen.reshape(-1, seen.shape[-1])
    columns = kernel.reshape(-1, kernel.shape[-1])
    product = jnp.matmul(rows, columns, precision=dict(how.options)["precision"])
    return product.reshape(*seen.shape[:-1], kernel.shape[-1])


def _seen(how: _How, images: Array) -> list[list[Array]]:
    """Returns, by row of the window, what its places see: [batch, ...positions, channels]."""
    padded = jnp.pad(images, ((0, 0), *how.pads, (0, 0)))
    room = [n - k for n, k in zip(padded.shape[1:-1], how.window, strict=True)]
    spans = [r // stride * stride + 1 for r, stride in zip(room, how.strides, strict=True)]

    def at(place: Sequence[int]) -> Array:
        seen = padded
        for axis, (start, span, stride) in enumerate(zip(place, spans, how.strides, strict=True)):
            # Not by indexing, which makes a gather of it where the batch has no fixed size.
            seen = jax.lax.slice_in_dim(seen, start, start + span, stride, axis + 1)
        return seen

    first, *others = map(range, how.window)
    return [[at((row, *place)) for place in itertools.product(*others)] for row in first]


def _convolve(next_fun, args, kwargs, context):
    module = context.module
    ours = isinstance(module, nn.Conv) and context.method_name == "__call__"
    if ours and module.conv_general_dilated is None:
        # A bound module belongs to this one call.
        object.__setattr__(module, "conv_general_dilated", convolve)
    return next_fun(*args, **kwargs)
