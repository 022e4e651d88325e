"""Convolutions as XLA is fastest at them on a CPU, behind the ordinary `nn.Conv`."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdq.types import Array

# Products of patches win from so many on; with 16 of each they take twice as long. Strided ones of
# fewer win by themselves, but not after a quantizer, which XLA then computes for each patch anew.
LEAST_CHANNELS, LEAST_FEATURES = 32, 64
MOST_BYTES = 1 << 28  # of the patches: they are kept for the backward pass


@contextlib.contextmanager
def fast_convolutions() -> Iterator[None]:
    """In this context, convolutions are matrix products where that is faster: on CPUs.

    1×1 convolutions then take half the time, forward and backward, and those of many channels and
    features 0.6 to 0.85 of it (1.1 at 4×4 positions), at the shapes measured in
    benchmarks/results/convolutions.json. Sums are taken in another order, no more.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    with nn.intercept_methods(_convolve):
        yield


def convolve(
    images: Array, kernel: Array, strides: Sequence[int], padding: Any, **given: Any
) -> Array:
    """`jax.lax.conv_general_dilated` as `nn.Conv` calls it, or the same as a matrix product.

    Args:
      images: [batch, ...positions, channels].
      kernel: [...window, channels, features].
      strides: of the window.
      padding: as for `jax.lax.conv_general_dilated`.
      **given: the rest of its arguments.

    Returns:
      [batch, ...positions, features].
    """
    *window, channels, features = kernel.shape
    plain = given["feature_group_count"] == 1 and all(
        one == 1 for name in ("lhs_dilation", "rhs_dilation") for one in given[name]
    )
    size, count = math.prod(window), math.prod(images.shape) // math.prod(strides)
    many = channels >= LEAST_CHANNELS and features >= LEAST_FEATURES
    fits = size * count * images.dtype.itemsize <= MOST_BYTES
    if not plain or not (size == 1 or (many and fits)):
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **given)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:-1], window, strides, padding)
    patches = jnp.concatenate(_patches(images, window, strides, padding), axis=-1)
    return jax.lax.dot_general(
        patches,
        kernel.reshape(-1, features),
        (((patches.ndim - 1,), (0,)), ((), ())),
        precision=given["precision"],
    )


def _patches(
    images: Array, window: Sequence[int], strides: Sequence[int], pads: Sequence[tuple[int, int]]
) -> list[Array]:
    """What each position of the window sees, [batch, ...positions, channels] each."""
    padded = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    room = [n - k for n, k in zip(padded.shape[1:-1], window, strict=True)]
    spans = [r // stride * stride + 1 for r, stride in zip(room, strides, strict=True)]
    found = []
    for position in itertools.product(*map(range, window)):
        seen = padded
        for axis, (start, span, stride) in enumerate(zip(position, spans, strides, strict=True)):
            # Not by indexing, which makes a gather of it where the batch has no fixed size.
            seen = jax.lax.slice_in_dim(seen, start, start + span, stride, axis + 1)
        found.append(seen)
    return found


def _convolve(next_fun, args, kwargs, context):
    module = context.module
    ours = isinstance(module, nn.Conv) and context.method_name == "__call__"
    if ours and module.conv_general_dilated is None:
        # A bound module belongs to this one call.
        object.__setattr__(module, "conv_general_dilated", convolve)
    return next_fun(*args, **kwargs)
