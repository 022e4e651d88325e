"""Fully connected network on flattened images, as in the first distillation paper."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


class MLP(nn.Module):
    """Dense layers with ReLU on the flattened image (the networks of arXiv:1503.02531, §3).

    Layers are named `dense_0`, `dense_1`, ..., `head`.

    Attributes:
      num_classes: width of the head.
      widths: hidden units, one a layer.
      dtype: compute dtype; parameters and logits stay float32.
    """

    num_classes: int
    widths: Sequence[int] = (1024, 1024)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """images: [batch, ...] float -> logits: [batch, classes] float32."""
        del train  # Nothing here behaves differently in training.
        x = images.reshape(images.shape[0], -1)
        for i, width in enumerate(self.widths):
            x = nn.Dense(
                width,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                name=f"dense_{i}",
            )(x)
            x = nn.relu(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


Model = MLP
