"""A product of activations, as a module: so that it has a path."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Product(nn.Module):
    """`jnp.einsum` of two arrays; no parameters. What has a path can be quantized."""

    @nn.compact
    def __call__(self, equation: str, lhs: jax.Array, rhs: jax.Array, **kwargs: Any) -> jax.Array:
        """lhs and rhs: arrays that `equation` fits -> their product."""
        return jnp.einsum(equation, lhs, rhs, **kwargs)
