"""A plain convolutional network: the student and the teacher of the small experiments."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


class CNN(nn.Module):
    """3×3 convolutions with ReLU, global average pooling, a dense head.

    Layers are named `conv_0`, `conv_1`, ..., (`norm_0`, ...,) `head`.

    Attributes:
      num_classes: width of the head.
      widths: output channels, one a convolution.
      strides: downsampling factor of each convolution, 1 or 2; None is 1, 2, 2, 1, 1, ...: an
        image of 8 pixels is then pooled from 2×2 positions, one of 28 pixels from 7×7.
      batch_norm: normalize between convolution and ReLU (arXiv:1502.03167); the convolutions then
        have no bias.
      pool: downsample by a 2×2 maximum after the ReLU rather than by a strided convolution.
      dtype: compute dtype; parameters, statistics and logits stay float32.
    """

    num_classes: int
    widths: Sequence[int] = (8, 16, 16)
    strides: Sequence[int] | None = None
    batch_norm: bool = False
    pool: bool = False
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.strides is not None:
            if len(self.strides) != len(self.widths):
                raise ValueError(
                    f"CNN: strides {tuple(self.strides)} and widths {tuple(self.widths)} must have "
                    "one entry a convolution each"
                )
            if not set(self.strides) <= {1, 2}:
                raise ValueError(f"CNN: strides must be 1 or 2, given {tuple(self.strides)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """images: [batch, height, width, channels] float -> logits: [batch, classes] float32."""
        x = images
        for i, (width, stride) in enumerate(zip(self.widths, self._strides(), strict=True)):
            x = nn.Conv(
                width,
                (3, 3),
                strides=1 if self.pool else stride,
                use_bias=not self.batch_norm,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                name=f"conv_{i}",
            )(x)
            if self.batch_norm:
                x = nn.BatchNorm(
                    use_running_average=not train, momentum=0.9, dtype=self.dtype, name=f"norm_{i}"
                )(x)
            x = nn.relu(x)
            if self.pool and stride == 2:
                x = max_pool_2x2(x)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)

    def _strides(self) -> Sequence[int]:
        if self.strides is not None:
            return self.strides
        return (1, 2, 2, *[1] * len(self.widths))[: len(self.widths)]


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """2×2 maximum with stride 2; an odd last row or column is dropped, as by `nn.max_pool`.

    Two pairwise maxima of strided slices: the backward pass of `nn.max_pool` is a
    select-and-scatter, which XLA runs 14 times slower on a CPU.

    Args:
      x: [batch, height, width, channels].

    Returns:
      [batch, height // 2, width // 2, channels].
    """
    for axis in (1, 2):
        size = x.shape[axis] // 2 * 2
        # Not by indexing, which makes a gather of it where the batch has no fixed size.
        even, odd = (jax.lax.slice_in_dim(x, start, size, 2, axis) for start in (0, 1))
        x = jnp.maximum(even, odd)
    return x


Model = CNN
