"""Vision transformer for small images (arXiv:2010.11929)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

XAVIER = nn.initializers.xavier_uniform()


class ViT(nn.Module):
    """Patches, learned positions, pre-norm blocks, the mean of the tokens, a head.

    The paper reads a class token; the mean of the normalized tokens does as well (its appendix
    D.3), and every token then is like the others.  No dropout.  Attention is Flax's own, so that
    its projections and its two products are layers that can be quantized.

    Layers are named `patches`, `block_<b>/{norm_0, attention/{query, key, value, out}, norm_1,
    dense_0, dense_1}`, `norm`, `head`; the positions are a parameter of `positions`.

    Attributes:
      num_classes: width of the head.
      patch: side of a square patch in pixels; must divide height and width of the images.
      width: of a token; a multiple of `heads`.
      depth: number of blocks, at least 1.
      heads: of each attention.
      mlp_width: hidden units of a block's MLP; None is 4 times `width`.
      dtype: compute dtype; parameters and logits stay float32.
    """

    num_classes: int
    patch: int = 4
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_width: int | None = None
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        for name in ("patch", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"ViT: {name} must be at least 1, given {getattr(self, name)}")
        if self.width < 1 or self.width % self.heads:
            raise ValueError(
                f"ViT: width must be a multiple of heads={self.heads}, given {self.width}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """images: [batch, height, width, channels] float -> logits: [batch, classes] float32.

        Raises:
          ValueError: patches that do not divide the images.
        """
        del train  # Nothing here behaves differently in training.
        batch, height, width, _ = images.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"ViT: patches of {self.patch}×{self.patch} do not divide images of "
                f"{height}×{width}"
            )
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding="VALID",
            dtype=self.dtype,
            name="patches",
        )(images)
        x = Positions(name="positions")(x.reshape(batch, -1, self.width))
        for b in range(self.depth):
            block = Block(
                self.heads, self.mlp_width or 4 * self.width, self.dtype, name=f"block_{b}"
            )
            x = block(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x).mean(1)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class Positions(nn.Module):
    """Adds a learned vector to each token, by its place."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [batch, tokens, width] -> the same shape and dtype."""
        table = self.param("table", nn.initializers.normal(0.02), x.shape[1:])
        return x + table.astype(x.dtype)


class Block(nn.Module):
    """x += attention(norm(x)); x += dense(gelu(dense(norm(x)))), with the tanh form of GELU."""

    heads: int
    mlp_width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [batch, tokens, width] -> the same shape."""
        y = nn.LayerNorm(dtype=self.dtype, name="norm_0")(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=self.heads, kernel_init=XAVIER, dtype=self.dtype, name="attention"
        )(y)
        y = nn.LayerNorm(dtype=self.dtype, name="norm_1")(x)
        y = nn.Dense(self.mlp_width, kernel_init=XAVIER, dtype=self.dtype, name="dense_0")(y)
        y = nn.Dense(x.shape[-1], kernel_init=XAVIER, dtype=self.dtype, name="dense_1")(nn.gelu(y))
        return x + y


Model = ViT
