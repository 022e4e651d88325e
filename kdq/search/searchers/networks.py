"""What the learning agents share: their network, and scores as rewards."""

from collections.abc import Sequence

import flax.linen as nn
import numpy as np
from scipy import special

from kdq.types import Array


class MLP(nn.Module):
    """A multilayer perceptron, its hidden layers normalized: many updates from few episodes."""

    hidden: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`x`: [..., inputs] float32, to [..., outputs]; small at first."""
        for width in self.hidden:
            x = nn.relu(nn.LayerNorm()(nn.Dense(width)(x)))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.normal(1e-2))(x)


def rewards(scores: Sequence[float], size: int) -> np.ndarray:
    """Scores by their ranks, as quantiles of a normal distribution; zeros up to `size`.

    The best so far has the most. Scores of whatever unit and spread give the same, and what is
    learned from does not fade as policies come to differ less. Equal scores get the mean of what
    they share; one that is not finite counts as the worst.

    Args:
      scores: less is better.
      size: of what is returned.

    Returns:
      [size] float32; the last scores are left out if there are more.
    """
    values = np.nan_to_num(np.asarray(scores, float), nan=np.inf, posinf=np.inf)
    worse = (values[:, None] < values).sum(1) + (values[:, None] == values).sum(1) / 2
    found = np.zeros(size, np.float32)
    found[: len(values)] = special.ndtri(worse / max(len(values), 1))
    return found
