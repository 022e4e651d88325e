"""EfficientNet-B0 (arXiv:1905.11946) and EfficientNet-Lite0 to Lite4, made for published weights.

Lite networks have no squeeze-and-excite, ReLU6 in place of swish, and a stem and a head that do not
grow: made for integers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from kdq.models.mobilenet import (
    ACTIVATIONS,
    InvertedResidual,
    check_padding,
    layers,
    round_channels,
)

EPSILON = 1e-3  # of batch norms

# (expansion, kernel, stride, channels, repeats) of B0, table 1.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class Variant(NamedTuple):
    """The difference of a network from B0."""

    width: float  # factor of channels
    depth: float  # factor of blocks
    size: int  # height and width of the images it was published for
    dropout: float
    lite: bool = True


VARIANTS = {
    "b0": Variant(1.0, 1.0, 224, 0.2, lite=False),
    "lite0": Variant(1.0, 1.0, 224, 0.2),
    "lite1": Variant(1.0, 1.1, 240, 0.2),
    "lite2": Variant(1.1, 1.2, 260, 0.3),
    "lite3": Variant(1.2, 1.4, 280, 0.3),
    "lite4": Variant(1.4, 1.8, 300, 0.3),
}


class EfficientNet(nn.Module):
    """A stem, seven stages of inverted residual blocks, a 1×1 convolution, pooling and a head.

    Layers are named as MobileNet's. There is no stochastic depth.

    Attributes:
      num_classes: width of the head.
      variant: "b0", or "lite0" to "lite4".
      padding: see `MobileNet`; the authors' weights want "SAME".
      dtype: compute dtype; parameters, statistics and logits stay float32.
    """

    num_classes: int
    variant: str = "lite0"
    padding: str = "SAME"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(
                f"EfficientNet: unknown variant {self.variant!r}; valid: {', '.join(VARIANTS)}"
            )
        check_padding("EfficientNet", self.padding)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """images: [batch, height, width, channels] float -> logits: [batch, classes] float32."""
        variant = VARIANTS[self.variant]
        function = "relu6" if variant.lite else "silu"
        activation = ACTIVATIONS[function]
        conv, norm = layers(self.padding, EPSILON, self.dtype, train)
        scale = lambda channels: round_channels(channels * variant.width)
        x = conv(32 if variant.lite else scale(32), 3, stride=2, name="stem")(images)
        x = activation(norm(name="stem_norm")(x))
        count = 0
        for s, (expansion, kernel, stride, width, repeats) in enumerate(STAGES):
            if not (variant.lite and s in (0, len(STAGES) - 1)):
                repeats = math.ceil(repeats * variant.depth)
            for repeat in range(repeats):
                channels = x.shape[-1]
                x = InvertedResidual(
                    width=scale(width),
                    expanded=channels * expansion,
                    kernel=kernel,
                    stride=stride if repeat == 0 else 1,
                    activation=function,
                    squeezed=0 if variant.lite else max(1, channels // 4),
                    squeeze_activation="silu",
                    gate=nn.sigmoid,
                    epsilon=EPSILON,
                    padding=self.padding,
                    dtype=self.dtype,
                    name=f"block_{count}",
                )(x, train=train)
                count += 1
        last = 1280 if variant.lite else scale(1280)
        x = activation(norm(name="last_norm")(conv(last, 1, name="last")(x))).mean((1, 2))
        x = nn.Dropout(variant.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


Model = EfficientNet
