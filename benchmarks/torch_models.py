"""The models of qat_step.py in plain PyTorch, of layers that a peer of kdq may replace."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layers(NamedTuple):
    """What a model is made of where quantization acts."""

    linear: Callable[..., nn.Module] = nn.Linear
    conv: Callable[..., nn.Module] = nn.Conv2d
    operand: Callable[[], nn.Module] = nn.Identity  # before each input of a product of activations


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


def resnet(layers: Layers) -> nn.Module:
    """ResNet-8 of 16, 32 and 64 channels; images are [batch, 3, 32, 32]."""
    return nn.Sequential(
        layers.conv(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        BasicBlock(layers, 16, 16, 1),
        BasicBlock(layers, 16, 32, 2),
        BasicBlock(layers, 32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        layers.linear(64, 10),
    )


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
