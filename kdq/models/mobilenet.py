"""MobileNetV2 (arXiv:1801.04381) and MobileNetV3 (arXiv:1905.02244), for published weights."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from kdq.models.resnet import HE_FAN_OUT

ACTIVATIONS = {"relu": nn.relu, "relu6": nn.relu6, "hard_swish": nn.hard_swish, "silu": nn.silu}
PADDINGS = ("SAME", "symmetric")


class MobileNet(nn.Module):
    """A stem, inverted residual blocks, a 1×1 convolution, average pooling and a head.

    Layers are named `stem`, `stem_norm`, `block_<i>/{expand, expand_norm, depthwise,
    depthwise_norm, squeeze/{reduce, restore}, project, project_norm}`, `last`, `last_norm`,
    `hidden` (V3), `head`.

    Attributes:
      num_classes: width of the head.
      version: "v2", "v3_large" or "v3_small".
      width_multiplier: of all channels but the head's, rounded to multiples of 8.
      dropout: rate before the head, in training.
      padding: "SAME", TensorFlow's, which pads the far side more where a stride asks for an odd
        number; "symmetric", PyTorch's, half a kernel on both sides. Published weights were trained
        with one of these.
      dtype: compute dtype; parameters, statistics and logits stay float32.
    """

    num_classes: int
    version: str = "v2"
    width_multiplier: float = 1.0
    dropout: float = 0.2
    padding: str = "symmetric"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ValueError(
                f"MobileNet: unknown version {self.version!r}; valid: {', '.join(VERSIONS)}"
            )
        if self.width_multiplier <= 0:
            raise ValueError(
                f"MobileNet: expected a positive width_multiplier, got {self.width_multiplier}"
            )
        check_padding("MobileNet", self.padding)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """images: [batch, height, width, channels] float -> logits: [batch, classes] float32."""
        version = VERSIONS[self.version]
        activation = ACTIVATIONS[version.activation]
        conv, norm = layers(self.padding, version.epsilon, self.dtype, train)
        scale = lambda channels: round_channels(channels * self.width_multiplier)
        x = conv(scale(version.stem), 3, stride=2, name="stem")(images)
        x = activation(norm(name="stem_norm")(x))
        for i, block in enumerate(version.blocks):
            x = InvertedResidual(
                width=scale(block.width),
                expanded=scale(block.expanded) if block.expanded else x.shape[-1] * block.expansion,
                kernel=block.kernel,
                stride=block.stride,
                activation=block.activation,
                squeezed=round_channels(scale(block.expanded) / 4) if block.squeeze else 0,
                epsilon=version.epsilon,
                padding=self.padding,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x, train=train)
        last = (
            6 * x.shape[-1]
            if version.hidden
            else round_channels(version.last * max(1.0, self.width_multiplier))
        )
        x = activation(norm(name="last_norm")(conv(last, 1, name="last")(x))).mean((1, 2))
        if version.hidden:
            x = activation(nn.Dense(version.hidden, dtype=self.dtype, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class InvertedResidual(nn.Module):
    """project(squeeze(depthwise(expand(x)))), plus x where the shape stays as it is.

    Attributes:
      width: channels of the output.
      expanded: channels of the depthwise convolution; those of the input: there is no expansion.
      kernel: side of the depthwise convolution.
      stride: of the same.
      activation: a key of `ACTIVATIONS`, behind the expansion and the depthwise convolution.
      squeezed: channels in the middle of squeeze-and-excite (arXiv:1709.01507); 0 leaves it out.
      squeeze_activation: a key of `ACTIVATIONS`, in the middle of it.
      gate: maps what it computes to the factors of the channels.
      epsilon: of the batch norms.
      padding: see `MobileNet`.
      dtype: compute dtype.
    """

    width: int
    expanded: int
    kernel: int
    stride: int
    activation: str
    squeezed: int = 0
    squeeze_activation: str = "relu"
    gate: Callable[[jax.Array], jax.Array] = nn.hard_sigmoid
    epsilon: float = 1e-5
    padding: str = "symmetric"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x: [batch, h, w, channels] -> [batch, ceil(h / stride), ceil(w / stride), width]."""
        conv, norm = layers(self.padding, self.epsilon, self.dtype, train)
        activation = ACTIVATIONS[self.activation]
        y = x
        if self.expanded != x.shape[-1]:
            y = activation(norm(name="expand_norm")(conv(self.expanded, 1, name="expand")(y)))
        y = conv(
            self.expanded, self.kernel, stride=self.stride, groups=self.expanded, name="depthwise"
        )(y)
        y = activation(norm(name="depthwise_norm")(y))
        if self.squeezed:
            between = ACTIVATIONS[self.squeeze_activation]
            y = SqueezeExcite(self.squeezed, between, self.gate, self.dtype, name="squeeze")(y)
        y = norm(name="project_norm")(conv(self.width, 1, name="project")(y))
        return x + y if x.shape == y.shape else y


class SqueezeExcite(nn.Module):
    """Scales each channel by a function of the means of all (arXiv:1709.01507)."""

    squeezed: int
    activation: Callable[[jax.Array], jax.Array]
    gate: Callable[[jax.Array], jax.Array]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [batch, h, w, channels] -> the same shape."""
        conv = partial(nn.Conv, kernel_size=(1, 1), dtype=self.dtype)
        means = x.mean((1, 2), keepdims=True)
        hidden = self.activation(conv(self.squeezed, name="reduce")(means))
        return x * self.gate(conv(x.shape[-1], name="restore")(hidden))


def layers(
    padding: str, epsilon: float, dtype: DTypeLike, train: bool
) -> tuple[Callable[..., nn.Conv], partial]:
    """The convolution and the batch norm that a mobile network is made of."""

    def conv(width: int, kernel: int, *, stride: int = 1, groups: int = 1, name: str) -> nn.Conv:
        half = (kernel // 2, kernel // 2)
        return nn.Conv(
            width,
            (kernel, kernel),
            strides=(stride, stride),
            padding="SAME" if padding == "SAME" else (half, half),
            feature_group_count=groups,
            use_bias=False,
            kernel_init=HE_FAN_OUT,
            dtype=dtype,
            name=name,
        )

    norm = partial(
        nn.BatchNorm, use_running_average=not train, momentum=0.99, epsilon=epsilon, dtype=dtype
    )
    return conv, norm


def round_channels(channels: float, divisor: int = 8) -> int:
    """Returns the multiple of `divisor` that is nearest, and at least 90 % of the channels."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def check_padding(model: str, padding: str) -> None:
    """Raises ValueError for a padding that is none of `PADDINGS`."""
    if padding not in PADDINGS:
        raise ValueError(f"{model}: unknown padding {padding!r}; valid: {', '.join(PADDINGS)}")


class Block(NamedTuple):
    """A row of the papers' tables, which have either an expansion or the expanded channels."""

    width: int
    stride: int
    kernel: int = 3
    expansion: int = 1
    expanded: int = 0
    squeeze: bool = False
    activation: str = "relu6"


class Version(NamedTuple):
    """A network of the papers."""

    stem: int
    blocks: tuple[Block, ...]
    last: int
    activation: str
    epsilon: float  # of batch norms
    hidden: int = 0  # width of the layer before the head


def _rows(*rows: tuple[int, int, int, int]) -> tuple[Block, ...]:
    """Blocks of MobileNetV2's table 2, whose rows are (expansion, channels, repeats, stride)."""
    return tuple(
        Block(width, stride if repeat == 0 else 1, expansion=expansion)
        for expansion, width, repeats, stride in rows
        for repeat in range(repeats)
    )


def _v3_rows(*rows: tuple[int, int, int, bool, str, int]) -> tuple[Block, ...]:
    """Blocks of MobileNetV3's tables 1 and 2: (kernel, expanded, channels, squeeze, f, stride)."""
    activations = {"RE": "relu", "HS": "hard_swish"}
    return tuple(
        Block(width, stride, kernel, 1, expanded, squeeze, activations[activation])
        for kernel, expanded, width, squeeze, activation, stride in rows
    )


VERSIONS = {
    "v2": Version(
        stem=32,
        blocks=_rows(
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ),
        last=1280,
        activation="relu6",
        epsilon=1e-5,
    ),
    "v3_large": Version(
        stem=16,
        blocks=_v3_rows(
            (3, 16, 16, False, "RE", 1),
            (3, 64, 24, False, "RE", 2),
            (3, 72, 24, False, "RE", 1),
            (5, 72, 40, True, "RE", 2),
            (5, 120, 40, True, "RE", 1),
            (5, 120, 40, True, "RE", 1),
            (3, 240, 80, False, "HS", 2),
            (3, 200, 80, False, "HS", 1),
            (3, 184, 80, False, "HS", 1),
            (3, 184, 80, False, "HS", 1),
            (3, 480, 112, True, "HS", 1),
            (3, 672, 112, True, "HS", 1),
            (5, 672, 160, True, "HS", 2),
            (5, 960, 160, True, "HS", 1),
            (5, 960, 160, True, "HS", 1),
        ),
        last=960,
        activation="hard_swish",
        epsilon=1e-3,
        hidden=1280,
    ),
    "v3_small": Version(
        stem=16,
        blocks=_v3_rows(
            (3, 16, 16, True, "RE", 2),
            (3, 72, 24, False, "RE", 2),
            (3, 88, 24, False, "RE", 1),
            (5, 96, 40, True, "HS", 2),
            (5, 240, 40, True, "HS", 1),
            (5, 240, 40, True, "HS", 1),
            (5, 120, 48, True, "HS", 1),
            (5, 144, 48, True, "HS", 1),
            (5, 288, 96, True, "HS", 2),
            (5, 576, 96, True, "HS", 1),
            (5, 576, 96, True, "HS", 1),
        ),
        last=576,
        activation="hard_swish",
        epsilon=1e-3,
        hidden=1024,
    ),
}

Model = MobileNet
