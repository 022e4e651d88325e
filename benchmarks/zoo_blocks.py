"""Blocks of known networks, small: what `zoo` puts together."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def depth_to_space(x: Any) -> Any:
    """[batch, H, W, 4C] -> [batch, 2H, 2W, C], as sub-pixel convolutions do."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def space_to_depth(x: Any) -> Any:
    """[batch, H, W, C] -> [batch, H/2, W/2, 4C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


def channel_shuffle(x: Any) -> Any:
    """Two groups of channels, interleaved."""
    return x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2).swapaxes(-1, -2).reshape(x.shape)


class OptionA(nn.Module):
    """A shortcut that has zeros for the channels that its block adds (arXiv:1512.03385)."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        y = nn.Conv(8, (3, 3))(nn.relu(nn.Conv(8, (3, 3), strides=2)(x)))
        x = nn.relu(y + jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2))))
        return nn.Dense(5)(x.mean((1, 2)))


class StandardizedConv(nn.Module):
    """A convolution whose kernel is standardized before it is used (arXiv:1903.10520)."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 3, 8))
        kernel = kernel - kernel.mean((0, 1, 2))
        kernel = kernel / (kernel.std((0, 1, 2)) + 1e-5)
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return nn.Dense(5)(nn.relu(x).mean((1, 2)))


class Dropped(nn.Module):
    """Dropout, which does nothing in evaluation mode."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(5)(x.mean((1, 2)))


def _conv_norm(x: Any, width: int, **options: Any) -> Any:
    x = nn.Conv(width, options.pop("size", (3, 3)), use_bias=False, **options)(x)
    return nn.BatchNorm(use_running_average=True)(x)


class Residual(nn.Module):
    """A block with a projection (arXiv:1512.03385)."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.relu(_conv_norm(x, 4))
        y = _conv_norm(nn.relu(_conv_norm(x, 8, strides=2)), 8)
        x = nn.relu(y + _conv_norm(x, 8, size=(1, 1), strides=2))
        return nn.Dense(5)(x.mean((1, 2)))


class DenseBlock(nn.Module):
    """Each layer sees all before it (arXiv:1608.06993)."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.Conv(4, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = jnp.concatenate([x, nn.Conv(4, (3, 3), use_bias=False)(y)], -1)
        x = nn.avg_pool(nn.Conv(4, (1, 1))(nn.relu(x)), (2, 2), (2, 2))
        return nn.Dense(5)(x.mean((1, 2)))


class InvertedBottleneck(nn.Module):
    """Wide, depthwise, narrow (arXiv:1801.04381)."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.relu6(_conv_norm(x, 6))
        y = nn.relu6(_conv_norm(x, 12, size=(1, 1)))
        y = nn.relu6(_conv_norm(y, 12, feature_group_count=12))
        x = x + _conv_norm(y, 6, size=(1, 1))
        return nn.Dense(5)(x.mean((1, 2)))


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole image has of them (arXiv:1709.01507)."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.silu(_conv_norm(x, 8))
        weights = nn.relu(nn.Dense(4)(x.mean((1, 2), keepdims=True)))
        x = x * nn.sigmoid(nn.Dense(8)(weights))
        return nn.Dense(5)(nn.Conv(6, (3, 3))(x).mean((1, 2)))


class Inception(nn.Module):
    """Branches of several sizes, one with a pool of stride 1 (arXiv:1409.4842)."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        pooled = nn.Conv(2, (1, 1))(nn.max_pool(x, (3, 3), padding="SAME"))
        branches = [nn.Conv(2, (1, 1))(x), nn.Conv(2, (3, 3))(nn.Conv(2, (1, 1))(x)), pooled]
        return nn.Dense(5)(nn.relu(jnp.concatenate(branches, -1)).mean((1, 2)))


class Grouped(nn.Module):
    """Groups, and a depthwise convolution with a multiplier."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=3)(x))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=6, kernel_dilation=2)(x))
        return nn.Dense(5)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """A 7×7 depthwise convolution, a norm and an MLP with a scale (arXiv:2201.03545)."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.LayerNorm()(nn.Conv(6, (2, 2), strides=2, padding="VALID")(x))
        y = nn.LayerNorm()(nn.Conv(6, (7, 7), feature_group_count=6)(x))
        y = nn.Dense(6)(nn.gelu(nn.Dense(12)(y)))
        x = x + y * self.param("gamma", nn.initializers.constant(0.5), (6,))
        return nn.Dense(5)(nn.LayerNorm()(x.mean((1, 2))))


class UNet(nn.Module):
    """Down, up, and the same sizes joined (arXiv:1505.04597); a class for each pixel."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        wide = nn.relu(nn.Conv(4, (3, 3))(x))
        small = nn.relu(nn.Conv(8, (3, 3))(nn.max_pool(wide, (2, 2), (2, 2))))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(small)
        x = nn.relu(nn.Conv(4, (3, 3))(jnp.concatenate([wide, x], -1)))
        return nn.Conv(3, (1, 1))(x)


class AutoEncoder(nn.Module):
    """An image as few numbers, and back."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        shape = x.shape
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.Dense(6, name="code")(x.reshape(shape[0], -1))
        x = nn.relu(nn.Dense(4 * 4 * 4)(x)).reshape(shape[0], 4, 4, 4)
        return nn.sigmoid(nn.ConvTranspose(shape[-1], (3, 3), strides=(2, 2))(x))


class Mixer(nn.Module):
    """Tokens and channels in turn (arXiv:2105.01601)."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.Conv(6, (4, 4), strides=4)(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(x.shape[1])(nn.gelu(nn.Dense(8)(y))).swapaxes(1, 2)
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
        return nn.Dense(5)(x.mean(1))


class Transformer(nn.Module):
    """Flax's own attention, with a class token and positions."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, x.shape[-1]))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1])), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.5), (1, *x.shape[1:]))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(5)(x[:, 0])


class CausalAttention(nn.Module):
    """A product of queries and keys under a triangle."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        query, key, value = jnp.split(nn.Dense(24)(x), 3, -1)
        scores = query @ key.swapaxes(1, 2) / jnp.sqrt(8.0)
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        x = x + nn.softmax(jnp.where(mask, scores, -1e9)) @ value
        return nn.Dense(5)(x[:, -1])


class MaskedAttention(nn.Module):
    """Attention only to where a second input is positive."""

    @nn.compact
    def __call__(self, x: Any, valid: Any, *, train: bool = False) -> Any:
        mask = nn.make_attention_mask(jnp.ones_like(valid), valid > -1.0)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x, mask=mask)
        return nn.Dense(5)(x.mean(1))


class Embeddings(nn.Module):
    """Words, positions, and a mean."""

    @nn.compact
    def __call__(self, tokens: Any, *, train: bool = False) -> Any:
        x = nn.Embed(11, 8)(tokens) + nn.Embed(6, 8)(jnp.arange(tokens.shape[1]))
        return nn.Dense(5)(nn.relu(nn.Dense(8)(x)).mean(1))


class LanguageModel(nn.Module):
    """The table of words is that of the logits, too."""

    @nn.compact
    def __call__(self, tokens: Any, *, train: bool = False) -> Any:
        embed = nn.Embed(11, 8)
        return embed.attend(nn.relu(nn.Dense(8)(embed(tokens))))


class _Step(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return x + nn.relu(nn.Dense(x.shape[-1])(x)), None


class Stack(nn.Module):
    """Layers of one shape as a scan."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        stack = nn.scan(_Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(5)(stack()(x, None)[0])


class Recurrent(nn.Module):
    """A cell over a sequence."""

    cell: Any

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        return nn.Dense(5)(nn.RNN(self.cell(6))(x)[:, -1])


class TwoInputs(nn.Module):
    """An image, and numbers about it."""

    @nn.compact
    def __call__(self, image: Any, about: Any, *, train: bool = False) -> Any:
        image = nn.relu(nn.Conv(6, (3, 3), strides=2)(image)).mean((1, 2))
        about = nn.relu(nn.Dense(6)(about))
        return nn.Dense(5)(jnp.concatenate([image, about], -1))


class TwoOutputs(nn.Module):
    """A classifier with an exit of its own in the middle."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        early = nn.Dense(5)(x.mean((1, 2)))
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        return nn.Dense(7)(x.mean((1, 2))), early


class NamedOutputs(nn.Module):
    """A detector: classes and boxes."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        boxes = nn.Conv(4, (3, 3))(x)
        return {"scores": nn.Conv(3, (3, 3))(x), "boxes": boxes.reshape(x.shape[0], -1, 4)}


class Siamese(nn.Module):
    """One network of two images, and how far apart they are."""

    @nn.compact
    def __call__(self, left: Any, right: Any, *, train: bool = False) -> Any:
        conv, head = nn.Conv(6, (3, 3), strides=2), nn.Dense(5)
        left, right = (head(nn.relu(conv(x)).mean((1, 2))) for x in (left, right))
        return jnp.abs(left - right)


class Experts(nn.Module):
    """A gate over two layers (arXiv:1701.06538), all of which compute."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        gate = nn.softmax(nn.Dense(2)(x))
        outputs = jnp.stack([nn.Dense(6)(x), nn.Dense(6)(x)], 1)
        return nn.Dense(5)(nn.relu((gate[..., None] * outputs).sum(1)))


class Sampler(nn.Module):
    """Values of an image between its pixels."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        at = jnp.meshgrid(jnp.linspace(0.5, 6.0, 5), jnp.linspace(0.2, 6.5, 5), indexing="ij")
        sample = lambda plane: jax.scipy.ndimage.map_coordinates(plane, at, order=1)
        x = jax.vmap(jax.vmap(sample, 2, 2))(x)
        return nn.Dense(5)(nn.Conv(4, (1, 1))(x).mean((1, 2)))
