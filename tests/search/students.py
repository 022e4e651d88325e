"""Tiny students with held-out examples, for the tests of what policies are judged by."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdq import models, tasks
from kdq.quantize import MSE
from kdq.search import bank, evaluate
from kdq.search.evaluate import Evaluator

TASK = tasks.build("classification")
CHOICES = ("W2A8", "W4", "A3", "W8A8", "")


def student():
    """A convolutional network: `(model, variables)`."""
    model = models.build("cnn", num_classes=5, widths=(4, 6))
    return model, jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))


def images(count, seed):
    return np.random.default_rng(seed).normal(size=(count, 8, 8, 1)).astype(np.float32)


def batches(sizes, size, seed=2):
    """Batches of `size` examples, of which so many count."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image": images(size, seed + i),
            "label": rng.integers(0, 5, size).astype(np.int32),
            "mask": (np.arange(size) < count).astype(np.float32),
        }
        for i, count in enumerate(sizes)
    ]


def evaluator(
    model,
    variables,
    choices,
    batches,
    calibration,
    *,
    classes=5,
    teacher_seed=3,
    task=TASK,
    **options,
):
    """With a teacher that says something else than the student."""
    count = sum(int(batch["mask"].sum()) for batch in batches)
    teacher = np.random.default_rng(teacher_seed).normal(size=(count, classes)).astype(np.float32)
    return Evaluator(
        network=model,
        task=task,
        variables=variables,
        choices=choices,
        bank=bank.fill(model, variables, choices, calibration, MSE()),
        held=evaluate.hold_out(model, variables, task, batches, teacher),
        **options,
    ), teacher


class Block(nn.Module):
    """One of a stack, with attention."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="up")(x), None


class Unseen(nn.Module):
    """Tokens in; a stack, a table that is looked up and attended to, a layer called twice."""

    @nn.compact
    def __call__(self, tokens, train=False):
        lookup = nn.Embed(11, 8, name="positions")(jnp.arange(tokens.shape[1])[None])
        embed = nn.Embed(11, 8, name="embed")
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="layers")(embed(tokens) + lookup, None)
        shared = nn.Dense(8, name="shared")
        return embed.attend(shared(nn.relu(shared(x))).mean(1))


def tokens(count, seed):
    return np.random.default_rng(seed).integers(0, 11, (count, 4)).astype(np.int32)
