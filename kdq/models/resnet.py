"""Residual networks for 28–32 pixel images (arXiv:1512.03385, §4.2)."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from kdq.models.cnn import max_pool_2x2

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet(nn.Module):
    """The CIFAR ResNet: a 3×3 stem, three stages of n basic blocks, average pooling, a head.

    A shortcut is the identity, except where the shape changes: there it is a 1×1 projection with
    batch norm (option B).  The paper's CIFAR networks pad with zeros instead (option A), which
    saves 2,752 parameters at the default widths; the projection is what the distillation
    literature compares on (torchdistill, mdistiller), and it quantizes like any other layer.

    Layers are named `stem`, `stem_norm`, `stage_<s>_block_<b>/{conv_0, norm_0, conv_1, norm_1,
    shortcut, shortcut_norm}`, `head`.

    Attributes:
      num_classes: width of the head.
      depth: 6n+2 for n blocks a stage: 8, 14, 20, 32, 44, 56, 110, ...
      widths: channels of the stem and of the three stages.  "ResNet-8×4" of the distillation
        literature is depth 8 with widths (32, 64, 128, 256).
      stem_pool: halve the image by a 2×2 maximum after the stem, as the ImageNet networks do: a
        quarter of the time, for images whose detail is coarse.
      dtype: compute dtype; parameters, statistics and logits stay float32.
    """

    num_classes: int
    depth: int = 20
    widths: Sequence[int] = (16, 16, 32, 64)
    stem_pool: bool = False
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(
                f"ResNet: depth {self.depth} is not 6n+2; valid: 8, 14, 20, 32, 44, 56, 110, ..."
            )
        if len(self.widths) != 4:
            raise ValueError(
                "ResNet: widths are those of the stem and of three stages, 4 numbers; "
                f"given {tuple(self.widths)}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """images: [batch, height, width, channels] float -> logits: [batch, classes] float32."""
        conv, norm = layers(self.dtype, train)
        stem, *stages = self.widths
        x = nn.relu(norm(name="stem_norm")(conv(stem, (3, 3), name="stem")(images)))
        if self.stem_pool:
            x = max_pool_2x2(x)
        for s, width in enumerate(stages):
            for b in range((self.depth - 2) // 6):
                stride = 2 if s > 0 and b == 0 else 1
                block = BasicBlock(width, stride, self.dtype, name=f"stage_{s}_block_{b}")
                x = block(x, train=train)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); the first convolution has the stride."""

    width: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x: [batch, h, w, channels] -> [batch, ceil(h / stride), ceil(w / stride), width]."""
        conv, norm = layers(self.dtype, train)
        y = conv(self.width, (3, 3), strides=self.stride, name="conv_0")(x)
        y = nn.relu(norm(name="norm_0")(y))
        y = norm(name="norm_1")(conv(self.width, (3, 3), name="conv_1")(y))
        if x.shape != y.shape:
            x = conv(self.width, (1, 1), strides=self.stride, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


def layers(dtype: DTypeLike, train: bool) -> tuple[partial, partial]:
    """The convolution and the batch norm that a residual network is made of."""
    conv = partial(nn.Conv, use_bias=False, kernel_init=HE_FAN_OUT, dtype=dtype)
    norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=dtype)
    return conv, norm


Model = ResNet
