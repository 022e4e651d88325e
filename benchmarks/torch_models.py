"""The models of qat_step.py and throughput.py in plain PyTorch.

They are made of layers that a peer of kdq may replace, or learned step sizes that are here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layers(NamedTuple):
    """Layers of a model where quantization acts."""

    linear: Callable[..., nn.Module] = nn.Linear
    conv: Callable[..., nn.Module] = nn.Conv2d
    operand: Callable[[], nn.Module] = nn.Identity  # before each input of a product of activations


class LearnedStep(torch.autograd.Function):
    """Fake quantization with the gradients of `kdq.quantize.fake_quantize` (LSQ, 1902.08153)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        """x, a scale that broadcasts to it, and the outermost codes -> the shape of x."""
        codes = torch.round(x / scale)
        y = codes.clamp(low, high) * scale
        ctx.save_for_backward(x, y, (codes >= low) & (codes <= high), scale)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Where the grid clips, the gradient goes to the scale alone."""
        x, y, inside, scale = ctx.saved_tensors
        of_x, of_scale = ctx.needs_input_grad[:2]
        found_x = g * inside if of_x else None
        found_scale = (g * (y - x * inside)).sum_to_size(scale.shape) / scale if of_scale else None
        return found_x, found_scale, None, None


class Lsq:
    """Mixin of a layer whose weight and input have learned step sizes."""

    def set_bits(self, bits: int, *, pixels: bool) -> None:
        """Weights per channel, inputs per tensor; of pixels: signed, with a scale that stays."""
        top = 2 ** (bits - 1) - 1
        self.weight_limits = (-top - 1, top)
        self.input_limits = self.weight_limits if pixels else (0, 2**bits - 1)
        largest = self.weight.detach().flatten(1).abs().amax(1)
        shape = (-1, *[1] * (self.weight.ndim - 1))
        self.weight_scale = nn.Parameter((largest / top).reshape(shape))
        self.input_scale = nn.Parameter(torch.tensor(4.0 / self.input_limits[1]), not pixels)

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the weight as they are multiplied."""
        return (
            LearnedStep.apply(x, self.input_scale, *self.input_limits),
            LearnedStep.apply(self.weight, self.weight_scale, *self.weight_limits),
        )


class LsqConv2d(Lsq, nn.Conv2d):
    """Wants `set_bits` before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Conv2d`."""
        return functional.conv2d(*self.rounded(x), self.bias, self.stride, self.padding)


class LsqLinear(Lsq, nn.Linear):
    """Wants `set_bits` before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        return functional.linear(*self.rounded(x), self.bias)


LSQ = Layers(linear=LsqLinear, conv=LsqConv2d)


def set_bits(model: nn.Module, bits: int, keep_bits: int) -> None:
    """Sets a model of `LSQ`; first and last layer have `keep_bits`, as in kdq's configs."""
    first, *others, last = (m for m in model.modules() if isinstance(m, Lsq))
    first.set_bits(keep_bits, pixels=True)
    last.set_bits(keep_bits, pixels=False)
    for layer in others:
        layer.set_bits(bits, pixels=False)


def cnn(
    layers: Layers,
    *,
    inputs: int,
    num_classes: int,
    widths: Sequence[int],
    batch_norm: bool = False,
    pool: bool = False,
) -> nn.Module:
    """As `kdq.models.cnn.CNN`; images are [batch, inputs, h, w]."""
    blocks: list[nn.Module] = []
    for i, width in enumerate(widths):
        halves = i in (1, 2)
        stride = 2 if halves and not pool else 1
        blocks.append(layers.conv(inputs, width, 3, stride=stride, padding=1, bias=not batch_norm))
        blocks += [nn.BatchNorm2d(width)] if batch_norm else []
        blocks.append(nn.ReLU())
        blocks += [nn.MaxPool2d(2)] if halves and pool else []
        inputs = width
    return nn.Sequential(*blocks, *_head(layers, inputs, num_classes))


def _head(layers: Layers, inputs: int, num_classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers.linear(inputs, num_classes)


def mlp(layers: Layers) -> nn.Module:
    """784-1024-1024-10 with ReLU; images are [batch, 1, 28, 28]."""
    return nn.Sequential(
        nn.Flatten(),
        layers.linear(784, 1024),
        nn.ReLU(),
        layers.linear(1024, 1024),
        nn.ReLU(),
        layers.linear(1024, 10),
    )


class BasicBlock(nn.Module):
    """As `kdq.models.resnet.BasicBlock`."""

    def __init__(self, layers: Layers, inputs: int, width: int, stride: int):
        super().__init__()
        conv = lambda size, channels, stride: layers.conv(
            channels, width, size, stride=stride, padding=size // 2, bias=False
        )
        self.conv_0, self.norm_0 = conv(3, inputs, stride), nn.BatchNorm2d(width)
        self.conv_1, self.norm_1 = conv(3, width, 1), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if inputs != width:
            self.shortcut = nn.Sequential(conv(1, inputs, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, inputs, h, w] -> [batch, width, h / stride, w / stride]."""
        y = functional.relu(self.norm_0(self.conv_0(x)))
        return functional.relu(self.norm_1(self.conv_1(y)) + self.shortcut(x))


def resnet(
    layers: Layers,
    *,
    inputs: int = 3,
    num_classes: int = 10,
    depth: int = 8,
    widths: Sequence[int] = (16, 16, 32, 64),
    stem_pool: bool = False,
) -> nn.Module:
    """As `kdq.models.resnet.ResNet`; images are [batch, inputs, h, w]."""
    width, *stages = widths
    blocks = [
        layers.conv(inputs, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *([nn.MaxPool2d(2)] if stem_pool else []),
    ]
    for s, stage in enumerate(stages):
        for b in range((depth - 2) // 6):
            blocks.append(BasicBlock(layers, width, stage, 2 if s > 0 and b == 0 else 1))
            width = stage
    return nn.Sequential(*blocks, *_head(layers, width, num_classes))


class Attention(nn.Module):
    """As Flax's: four projections and two products."""

    def __init__(self, layers: Layers, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (layers.linear(width, width) for _ in range(4))
        self.operands = nn.ModuleList(layers.operand() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, tokens, width] -> the same shape."""
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = (split(f(x)) for f in (self.query, self.key, self.value))
        of_query, of_key, of_weights, of_value = self.operands
        scores = of_query(query / query.shape[-1] ** 0.5) @ of_key(key).transpose(-1, -2)
        mixed = of_weights(scores.softmax(-1)) @ of_value(value)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """As `kdq.models.vit.Block`."""

    def __init__(self, layers: Layers, width: int, heads: int):
        super().__init__()
        self.norm_0, self.norm_1 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention = Attention(layers, width, heads)
        self.dense_0, self.dense_1 = (
            layers.linear(width, 4 * width),
            layers.linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, tokens, width] -> the same shape."""
        x = x + self.attention(self.norm_0(x))
        hidden = functional.gelu(self.dense_0(self.norm_1(x)), approximate="tanh")
        return x + self.dense_1(hidden)


class ViT(nn.Module):
    """4 blocks of 128 with 4 heads, patches of 4; images are [batch, 3, 32, 32]."""

    def __init__(self, layers: Layers):
        super().__init__()
        self.patches = layers.conv(3, 128, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, 128))
        self.blocks = nn.Sequential(*(Block(layers, 128, 4) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(128, eps=1e-6), layers.linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """images -> logits [batch, 10]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


MODELS = {
    "mlp": ("MLP 784-1024-1024-10, batch 256", mlp, (256, 1, 28, 28)),
    "resnet": ("ResNet-8 16/32/64, 32x32x3, batch 64", resnet, (64, 3, 32, 32)),
    "vit": ("ViT 4 blocks of 128, 4 heads, patch 4, 32x32x3, batch 64", ViT, (64, 3, 32, 32)),
}
