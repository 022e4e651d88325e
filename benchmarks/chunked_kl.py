"""Memory and time of the chunked softened KL over the dense one, value and gradients together.

    python benchmarks/chunked_kl.py --out=benchmarks/results/chunked_kl.json

All variants of a setting take turns in one process; a ratio is the median over rounds of the
variant's time over the dense loss's time in the same round. Memory is what the compiler plans for
temporary arrays and results; the hidden states and heads that all variants are given are no part.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from interleaved import publish, run, show, take_turns

from kdq.distill import losses
from kdq.distill.chunked import chunked_kl

OUT = flags.DEFINE_string("out", None, "JSON file for the figures; printed only if not given.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed rounds of each setting.", lower_bound=1)

TEMPERATURE = 2.0
# Tokens, words, width of the hidden states, and the chunks to compare with the one chosen.
SETTINGS = {
    "vocabulary 32768": {"tokens": 2048, "vocabulary": 32768, "d": 256, "chunks": (32, 64, 512)},
    "vocabulary 131072": {"tokens": 1024, "vocabulary": 131072, "d": 256, "chunks": (64,)},
    "wide, vocabulary 4096": {"tokens": 4096, "vocabulary": 4096, "d": 1024, "chunks": (64, 128)},
}


def dense(student_hidden, student_head, teacher_hidden, teacher_head):
    student, teacher = student_hidden @ student_head, teacher_hidden @ teacher_head
    return jnp.mean(losses.kl(student, teacher, TEMPERATURE))


def chunked(*arrays, chunk: int | None = None, reduction: str = "mean"):
    return jnp.mean(chunked_kl(*arrays, TEMPERATURE, chunk=chunk, reduction=reduction))


def variants(chunks: tuple[int, ...]) -> dict[str, Callable[..., jax.Array]]:
    return {
        "dense": dense,
        'chunked, "mean"': chunked,
        'chunked, "none"': functools.partial(chunked, reduction="none"),
        **{f'chunked, "mean", {c} tokens': functools.partial(chunked, chunk=c) for c in chunks},
    }


def measure(arrays: list[jax.Array], chunks: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Bytes, milliseconds and ratios of each variant, and how far its results are from dense."""
    steps = {
        name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays).compile()
        for name, loss in variants(chunks).items()
    }
    plans = {name: step.memory_analysis() for name, step in steps.items()}
    memory = {k: p.temp_size_in_bytes + p.output_size_in_bytes for k, p in plans.items()}
    expected = steps["dense"](*arrays)
    rows = {k: {"error": _differences(step(*arrays), expected)} for k, step in steps.items()}
    turns = {name: functools.partial(step, *arrays) for name, step in steps.items()}
    for name, row in take_turns(turns, "dense", rounds=rounds, warmup=0).items():
        rows[name] |= {
            "bytes": memory[name],
            "dense_bytes_over_bytes": round(memory["dense"] / memory[name], 2),
            **row,
        }
    return rows


def _differences(results, expected) -> dict[str, float]:
    """The largest difference of each result, as a part of the largest number in it."""
    names = ("value", "student_hidden", "student_head")
    pairs = zip((results[0], *results[1]), (expected[0], *expected[1]), strict=True)
    return {
        name: float(f"{float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))):.2g}")
        for name, (a, b) in zip(names, pairs, strict=True)
    }


def make_arrays(tokens: int, vocabulary: int, d: int) -> list[jax.Array]:
    """Hidden states and heads of student and teacher, with logits of standard deviation 2."""
    rng = np.random.default_rng(0)
    arrays = []
    for _ in range(2):
        arrays.append(rng.standard_normal((tokens, d), np.float32))
        arrays.append(2 * rng.standard_normal((d, vocabulary), np.float32) / np.float32(d**0.5))
    return [jax.device_put(v) for v in arrays]


def main(_: list[str]) -> None:
    figures = {}
    for title, setting in SETTINGS.items():
        sizes = {k: v for k, v in setting.items() if k != "chunks"}
        rows = measure(make_arrays(**sizes), setting["chunks"], ROUNDS.value)
        figures[title] = {**sizes, "variants": rows}
        show(title, rows)
    publish(figures, OUT.value, rounds=ROUNDS.value)


if __name__ == "__main__":
    run(main)
