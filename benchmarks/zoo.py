"""Small networks as people write them, one for each thing that a network may do.

`export_matrix.py` exports each of them to every format; tests/deploy/test_zoo.py does so with some.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import zoo_blocks
from flax.linen import pooling

from kdq.quantize.network import as_network

EXAMPLES = 16
VOCABULARY = 11


@dataclasses.dataclass(frozen=True)
class Entry:
    """A network with what it takes."""

    model: nn.Module
    shapes: tuple[tuple[int, ...], ...]  # of its inputs, without the batch
    tokens: bool = False  # its first input is of integers

    def inputs(self, examples: int = EXAMPLES) -> Any:
        """An array, or a tuple of arrays if it takes several."""
        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=(examples, *shape)).astype(np.float32) for shape in self.shapes]
        if self.tokens:
            shape = (examples, *self.shapes[0])
            arrays[0] = rng.integers(0, VOCABULARY, shape).astype(np.int32)
        return arrays[0] if len(arrays) == 1 else tuple(arrays)

    def variables(self) -> Any:
        """Drawn, norms too, so that none is the identity."""
        inputs = self.inputs(1)
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = jax.jit(as_network(self.model).init)(keys, inputs)
        rng = np.random.default_rng(1)

        def drawn(path: Any, array: Any) -> Any:
            name = jax.tree_util.keystr(path)
            if "batch_stats" in name and "var" in name:
                return jnp.asarray(rng.uniform(0.5, 1.5, array.shape), array.dtype)
            if name.endswith("['bias']") or "mean" in name:
                return jnp.asarray(rng.normal(0, 0.2, array.shape), array.dtype)
            if name.endswith("['scale']"):
                return jnp.asarray(rng.uniform(0.5, 1.5, array.shape), array.dtype)
            return array

        return jax.tree_util.tree_map_with_path(drawn, variables)


class Between(nn.Module):
    """A convolution, something, and a classifier behind another convolution."""

    something: Callable[[Any], Any]  # of an array, within `nn.compact`
    rank: int = 2

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.relu(nn.Conv(8, (3,) * self.rank)(x))
        x = self.something(x)
        x = nn.Conv(6, (1,) * self.rank)(x)
        return nn.Dense(5)(x.mean(range(1, x.ndim - 1)))


class Behind(nn.Module):
    """Something that takes a convolution as it is, before a rectifier, and classifies flat."""

    something: Callable[[Any], Any]
    rank: int = 2

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = self.something(nn.Conv(8, (3,) * self.rank)(x))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class First(nn.Module):
    """Something on the images themselves."""

    something: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = self.something(x)
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, padding="VALID")(x))
        return nn.Dense(5)(x.mean((1, 2)))


IMAGE, LINE, VOLUME = (8, 8, 3), (12, 3), (6, 6, 6, 2)
OF_RANK = {1: LINE, 2: IMAGE, 3: VOLUME}


def _between(something: Callable, rank: int = 2) -> Entry:
    return Entry(Between(something, rank), (OF_RANK[rank],))


def _behind(something: Callable, rank: int = 2) -> Entry:
    return Entry(Behind(something, rank), (OF_RANK[rank],))


def _first(something: Callable) -> Entry:
    return Entry(First(something), (IMAGE,))


PAIR = ((1, 1), (1, 1))

POOLING = {
    "max_pool 2x2": _between(lambda x: nn.max_pool(x, (2, 2), (2, 2))),
    "max_pool 3x3/2 SAME": _between(lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME")),
    "max_pool 3x3/2 padded by 1": _between(lambda x: nn.max_pool(x, (3, 3), (2, 2), PAIR)),
    "max_pool 1-D": _between(lambda x: nn.max_pool(x, (2,), (2,)), 1),
    "max_pool 3-D": _between(lambda x: nn.max_pool(x, (2, 2, 2), (2, 2, 2)), 3),
    "max_pool of negative numbers": _behind(lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME")),
    "max_pool global": _between(lambda x: nn.max_pool(x, x.shape[1:3])),
    "max_pool dilated": _between(
        lambda x: jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", None, (1, 2, 2, 1)
        )
    ),
    "max over the channels (maxout)": _between(lambda x: x.reshape(*x.shape[:-1], 4, 2).max(-1)),
    "min_pool 2x2": _behind(lambda x: pooling.min_pool(x, (2, 2), (2, 2))),
    "avg_pool 2x2": _between(lambda x: nn.avg_pool(x, (2, 2), (2, 2))),
    "avg_pool 3x3 SAME": _between(lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME")),
    "avg_pool SAME, padding not counted": _between(
        lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False)
    ),
    "avg_pool 1-D": _between(lambda x: nn.avg_pool(x, (3,), (2,)), 1),
    "avg_pool 3-D": _between(lambda x: nn.avg_pool(x, (2, 2, 2), (2, 2, 2)), 3),
    "global mean and max": _behind(lambda x: jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1)),
    "sum pooling by reduce_window": _between(
        lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    ),
}

PADDING = {
    "jnp.pad before VALID": _first(lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))),
    "jnp.pad between layers": _between(lambda x: jnp.pad(x, ((0, 0), (0, 1), (1, 0), (0, 0)))),
    "jnp.pad by a value": _between(
        lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    ),
    "jnp.pad reflect": _between(
        lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    ),
    "jnp.pad edge": _first(lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")),
    "jnp.pad wrap": _first(lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")),
    "lax.pad negative and interior": _between(
        lambda x: jax.lax.pad(x, 0.0, ((0, 0, 0), (-1, 2, 1), (1, -1, 0), (0, 0, 0)))
    ),
    "Conv CAUSAL, dilated": _between(
        lambda x: nn.Conv(8, (3,), padding="CAUSAL", kernel_dilation=2)(x), 1
    ),
    "Conv CIRCULAR": _between(lambda x: nn.Conv(8, (3, 3), padding="CIRCULAR")(x)),
    "Conv REFLECT": _between(lambda x: nn.Conv(8, (3, 3), padding="REFLECT")(x)),
    "option-A shortcut": Entry(zoo_blocks.OptionA(), (IMAGE,)),
    "shift by jnp.roll": _between(lambda x: jnp.roll(x, 1, axis=1)),
}


def _prelu(x: Any) -> Any:
    return nn.PReLU()(x)


ACTIVATIONS = {
    name: _behind(function)
    for name, function in {
        "relu6": nn.relu6,
        "hard_swish": nn.hard_swish,
        "hard_sigmoid": nn.hard_sigmoid,
        "hard_tanh": nn.hard_tanh,
        "gelu (tanh)": nn.gelu,
        "gelu (erf)": lambda x: nn.gelu(x, approximate=False),
        "silu": nn.silu,
        "sigmoid": nn.sigmoid,
        "leaky_relu": nn.leaky_relu,
        "PReLU": _prelu,
        "elu": nn.elu,
        "celu": nn.celu,
        "selu": nn.selu,
        "softplus": nn.softplus,
        "softsign": nn.soft_sign,
        "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
        "tanh": nn.tanh,
        "glu": nn.glu,
        "softmax": nn.softmax,
        "log_softmax": nn.log_softmax,
        "clip": lambda x: jnp.clip(x, -0.5, 0.5),
        "squared relu": lambda x: jnp.square(nn.relu(x)),
        "abs, sqrt, power": lambda x: jnp.sqrt(jnp.abs(x) + 1e-3) + jnp.abs(x) ** 1.5,
        "where": lambda x: jnp.where(x > 0.1, x, 0.3 * x),
        "sin and cos": lambda x: jnp.sin(x) + jnp.cos(x),
    }.items()
}

NORMS = {
    "BatchNorm": _between(lambda x: nn.relu(nn.BatchNorm(use_running_average=True)(x))),
    "BatchNorm behind a layer": _behind(
        lambda x: nn.relu(nn.BatchNorm(use_running_average=True)(x))
    ),
    "LayerNorm": _behind(lambda x: nn.LayerNorm()(x)),
    "GroupNorm": _behind(lambda x: nn.GroupNorm(num_groups=2)(x)),
    "RMSNorm": _behind(lambda x: nn.RMSNorm()(x)),
    "InstanceNorm": _behind(lambda x: nn.InstanceNorm()(x)),
    "WeightNorm": _between(lambda x: nn.WeightNorm(nn.Conv(8, (3, 3)))(x)),
    "unit vectors": _behind(lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)),
    "standardized weights": Entry(zoo_blocks.StandardizedConv(), (IMAGE,)),
}

UPSAMPLING = {
    "resize nearest": _between(
        lambda x: jax.image.resize(x, (x.shape[0], 16, 16, x.shape[3]), "nearest")
    ),
    "resize bilinear": _between(
        lambda x: jax.image.resize(x, (x.shape[0], 16, 16, x.shape[3]), "bilinear")
    ),
    "resize bilinear, smaller": _between(
        lambda x: jax.image.resize(x, (x.shape[0], 5, 5, x.shape[3]), "bilinear")
    ),
    "resize cubic": _between(
        lambda x: jax.image.resize(x, (x.shape[0], 12, 12, x.shape[3]), "cubic")
    ),
    "jnp.repeat": _between(lambda x: jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)),
    "ConvTranspose": _between(lambda x: nn.ConvTranspose(6, (3, 3), strides=(2, 2))(x)),
    "depth to space": _between(zoo_blocks.depth_to_space),
    "space to depth": _first(zoo_blocks.space_to_depth),
}

SHAPES = {
    "concatenate": _between(lambda x: jnp.concatenate([x, nn.Conv(4, (3, 3))(x)], -1)),
    "split": _between(lambda x: sum(jnp.split(x, 2, axis=-1))),
    "array_split by indices": _between(lambda x: jnp.split(x, [2, 5], axis=-1)[1]),
    "stack": _between(lambda x: jnp.stack([x, -x], -1).reshape(*x.shape[:-1], -1)),
    "einsum": _between(lambda x: jnp.einsum("bhwc,bhwd->bcd", x, x)[:, None]),
    "nn.Einsum": _between(lambda x: nn.Einsum((8, 6), "bhwc,cd->bhwd")(x)),
    "DenseGeneral": _behind(lambda x: nn.DenseGeneral((2, 3), axis=(-2, -1))(x)),
    "channel shuffle": _between(zoo_blocks.channel_shuffle),
    "slices and flips": _between(lambda x: x[:, ::2, 1:-1] + jnp.flip(x, 2)[:, ::2, 1:-1]),
    "take along axis": _between(lambda x: jnp.take(x, jnp.array([3, 1, 0]), axis=-1)),
    "argmax and one_hot": _behind(lambda x: x * nn.one_hot(x.argmax(-1), 8)),
    "top_k": _behind(lambda x: jax.lax.top_k(x, 3)[0]),
    "sort": _behind(lambda x: jnp.sort(x, axis=-1)),
    "cumsum": _behind(lambda x: jnp.cumsum(x, axis=1)),
    "dropout": Entry(zoo_blocks.Dropped(), (IMAGE,)),
    "var and std": _behind(
        lambda x: (x - x.mean((1, 2), keepdims=True)) / (x.std((1, 2), keepdims=True) + 1.0)
    ),
    "one element of each example": _behind(
        lambda x: x[jnp.arange(x.shape[0]), x[:, :, 0, 0].argmax(1)]
    ),
}

NETWORKS = {
    "residual block": Entry(zoo_blocks.Residual(), (IMAGE,)),
    "dense block": Entry(zoo_blocks.DenseBlock(), (IMAGE,)),
    "inverted bottleneck": Entry(zoo_blocks.InvertedBottleneck(), (IMAGE,)),
    "squeeze-excite": Entry(zoo_blocks.SqueezeExcite(), (IMAGE,)),
    "inception": Entry(zoo_blocks.Inception(), (IMAGE,)),
    "grouped and depthwise convolutions": Entry(zoo_blocks.Grouped(), (IMAGE,)),
    "ConvNeXt block": Entry(zoo_blocks.ConvNeXt(), (IMAGE,)),
    "U-Net": Entry(zoo_blocks.UNet(), (IMAGE,)),
    "autoencoder": Entry(zoo_blocks.AutoEncoder(), (IMAGE,)),
    "MLP-Mixer": Entry(zoo_blocks.Mixer(), (IMAGE,)),
    "transformer": Entry(zoo_blocks.Transformer(), ((6, 8),)),
    "attention by hand, causal": Entry(zoo_blocks.CausalAttention(), ((6, 8),)),
    "attention masked by an input": Entry(zoo_blocks.MaskedAttention(), ((6, 8), (6,))),
    "embeddings": Entry(zoo_blocks.Embeddings(), ((6,),), tokens=True),
    "language model (attend)": Entry(zoo_blocks.LanguageModel(), ((6,),), tokens=True),
    "scanned stack": Entry(zoo_blocks.Stack(), ((8,),)),
    "LSTM": Entry(zoo_blocks.Recurrent(nn.LSTMCell), ((5, 4),)),
    "OptimizedLSTM": Entry(zoo_blocks.Recurrent(nn.OptimizedLSTMCell), ((5, 4),)),
    "GRU": Entry(zoo_blocks.Recurrent(nn.GRUCell), ((5, 4),)),
    "simple cell": Entry(zoo_blocks.Recurrent(nn.SimpleCell), ((5, 4),)),
    "two inputs": Entry(zoo_blocks.TwoInputs(), (IMAGE, (4,))),
    "two outputs, a tuple": Entry(zoo_blocks.TwoOutputs(), (IMAGE,)),
    "two outputs, a dict": Entry(zoo_blocks.NamedOutputs(), (IMAGE,)),
    "two towers (siamese)": Entry(zoo_blocks.Siamese(), (IMAGE, IMAGE)),
    "mixture of experts": Entry(zoo_blocks.Experts(), ((8,),)),
    "spatial transformer (map_coordinates)": Entry(zoo_blocks.Sampler(), (IMAGE,)),
}

ZOO: dict[str, dict[str, Entry]] = {
    "Pooling": POOLING,
    "Padding": PADDING,
    "Activations": ACTIVATIONS,
    "Norms": NORMS,
    "Upsampling": UPSAMPLING,
    "Shapes": SHAPES,
    "Networks": NETWORKS,
}
ALL = {name: entry for kind in ZOO.values() for name, entry in kind.items()}
