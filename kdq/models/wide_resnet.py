"""Wide residual networks for 28–32 pixel images (arXiv:1605.07146)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from kdq.models.resnet import layers


class WideResNet(nn.Module):
    """WRN-depth-width: pre-activation blocks, three stages of 16k, 32k and 64k channels.

    The shortcut is the identity, except where the shape changes: there it is a 1×1 projection of
    the block's normalized input, as in the authors' code.  No dropout.

    Layers are named `stem`, `stage_<s>_block_<b>/{norm_0, conv_0, norm_1, conv_1, shortcut}`,
    `norm`, `head`.

    Attributes:
      num_classes: width of the head.
      depth: 6n+4 for n blocks a stage: 10, 16, 22, 28, 40, ...
      width_multiplier: k, at least 1.
      dtype: compute dtype; parameters, statistics and logits stay float32.
    """

    num_classes: int
    depth: int = 16
    width_multiplier: int = 2
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(
                f"WideResNet: depth {self.depth} is not 6n+4; valid: 10, 16, 22, 28, 34, 40, ..."
            )
        if self.width_multiplier < 1:
            raise ValueError(
                f"WideResNet: width_multiplier must be at least 1, given {self.width_multiplier}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """images: [batch, height, width, channels] float -> logits: [batch, classes] float32."""
        conv, norm = layers(self.dtype, train)
        x = conv(16, (3, 3), name="stem")(images)
        for s, width in enumerate((16, 32, 64)):
            for b in range((self.depth - 4) // 6):
                x = PreactivationBlock(
                    width * self.width_multiplier,
                    stride=2 if s > 0 and b == 0 else 1,
                    dtype=self.dtype,
                    name=f"stage_{s}_block_{b}",
                )(x, train=train)
        x = nn.relu(norm(name="norm")(x)).mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class PreactivationBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))); the first convolution has the stride."""

    width: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x: [batch, h, w, channels] -> [batch, ceil(h / stride), ceil(w / stride), width]."""
        conv, norm = layers(self.dtype, train)
        y = nn.relu(norm(name="norm_0")(x))
        if x.shape[-1] != self.width or self.stride != 1:
            x = conv(self.width, (1, 1), strides=self.stride, name="shortcut")(y)
        y = conv(self.width, (3, 3), strides=self.stride, name="conv_0")(y)
        y = conv(self.width, (3, 3), name="conv_1")(nn.relu(norm(name="norm_1")(y)))
        return x + y


Model = WideResNet
