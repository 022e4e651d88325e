"""Fresh weights."""

import functools

import flax.linen as nn
import jax
import numpy as np

from kdq.quantize.inputs import unboxed
from kdq.quantize.network import as_network
from kdq.types import Array, Variables


# Runs once, but full optimization of the samplers takes ten times as long to compile.
@functools.partial(
    jax.jit,
    static_argnames=("model",),
    compiler_options={"xla_backend_optimization_level": 0},
)
def variables(model: nn.Module, key: Array, images: np.ndarray) -> Variables:
    """The model's variables at the start of training, drawn from `key`, without boxes of Flax."""
    return unboxed(as_network(model).init(key, images))
