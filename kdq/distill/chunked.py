"""Softened KL from hidden states: the logits exist for one chunk of tokens at a time.

With V words, the dense loss holds several [tokens, V] float32 arrays, most of a training step's
memory for a large vocabulary. Here a scan over chunks of tokens makes the two chunks of logits,
reduces them to losses and, where a gradient is wanted, to gradients of the student's last layer
(as Liger-Kernel does, arXiv:2410.10989). Chunks are of tokens, not of the vocabulary: every row of
logits is then whole, so one pass gives its normalizer, its loss and its gradient.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kdq.distill import losses
from kdq.distill.reduction import check_classes, check_mask, hide, reduce
from kdq.types import Array


def chunked_kl(
    student_hidden: Array,
    student_head: Array,
    teacher_hidden: Array,
    teacher_head: Array,
    temperature: Array | float = 1.0,
    *,
    mask: Array | None = None,
    student_bias: Array | None = None,
    teacher_bias: Array | None = None,
    chunk: int | None = None,
    reduction: str = "none",
) -> Array:
    """T² KL(teacher ‖ student) of two language models' logits, without the logits in memory.

    The same as `losses.kl(student_hidden @ student_head + student_bias, teacher_hidden @
    teacher_head + teacher_bias, temperature)` (Hinton et al., 2015, arXiv:1503.02531), with
    gradients to the student's three arrays only: none to the teacher, the mask or the temperature.
    A bias of −inf rules a word out, as a logit of −inf does there.

    "sum" and "mean" make the gradients in the forward pass, at the dense loss's number of
    multiplications; prefer them in training. "none" cannot, since each token's cotangent is only
    known in the backward pass: there the logits are computed a second time, half as many
    multiplications again. Without a gradient, all three compute the values only. Reverse mode only.

    Args:
      student_hidden: [tokens..., d_s], float32 or bfloat16: any number of leading axes.
      student_head: [d_s, vocabulary].
      teacher_hidden: [tokens..., d_t].
      teacher_head: [d_t, vocabulary].
      temperature: T > 0; may be traced.
      mask: [tokens...] of 0 and 1; those of 0 have value 0 and no gradient, whatever their hidden
        states hold. None counts all.
      student_bias: [vocabulary], added to the logits if given.
      teacher_bias: [vocabulary], likewise.
      chunk: the most tokens whose logits exist at a time, at least 1, static; chunks are made even.
        If None, an eighth of the tokens, but at least 32 and at most max(128, d_s / 2): the chunk's
        logits then take no more than the gradient of a wide head, and that gradient, to which every
        chunk adds, is not read and written too often.
      reduction: "none", "sum", or "mean" over the tokens that count (0 if there are none).

    Returns:
      float32: [tokens...] for "none", else a scalar. Logits and their softmax are float32 whatever
      the inputs; gradients accumulate in float32 and have the dtypes of what they belong to.
    """
    for whose, hidden, head, bias in (
        ("student", student_hidden, student_head, student_bias),
        ("teacher", teacher_hidden, teacher_head, teacher_bias),
    ):
        fits = hidden.ndim > 0 and head.ndim == 2 and hidden.shape[-1] == head.shape[0]
        if not fits or (bias is not None and bias.shape != head.shape[1:]):
            raise ValueError(
                f"{whose} hidden {hidden.shape}, head {head.shape} and bias "
                f"{getattr(bias, 'shape', None)} must be [tokens..., d], [d, vocabulary] and "
                "[vocabulary] or None"
            )
    tokens, d_s, d_t = student_hidden.shape[:-1], student_head.shape[0], teacher_head.shape[0]
    if teacher_hidden.shape[:-1] != tokens or teacher_head.shape[1] != student_head.shape[1]:
        raise ValueError(
            f"student hidden {student_hidden.shape}, head {student_head.shape} and teacher hidden "
            f"{teacher_hidden.shape}, head {teacher_head.shape} must have one vocabulary and "
            "the same tokens"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, given {chunk}")
    check_classes(student_head)
    if mask is not None:
        check_mask(mask, tokens)

    count = math.prod(tokens)
    if chunk is None:
        # On two cores 128 tokens are as fast as any number, and 32 take 1.7 times as long (see
        # benchmarks/chunked_kl.py); d_s / 2 keeps products above memory traffic on faster devices.
        chunk = min(max(32, math.ceil(count / 8)), max(128, d_s // 2))
    # Hidden, or a NaN in the padding would reach the gradient of the head as 0 · NaN.
    student = (hide(student_hidden, mask).reshape(count, d_s), student_head, student_bias)
    teacher = (hide(teacher_hidden, mask).reshape(count, d_t), teacher_head, teacher_bias)
    temperature = jnp.asarray(temperature, jnp.float32)
    if reduction == "none":
        values = _each(chunk, student, teacher, temperature)
        return reduce(values.reshape(tokens), mask, reduction)
    # A reduction is linear in the values, so its gradient holds its weights.
    weights = jax.grad(reduce)(jnp.zeros(tokens, jnp.float32), mask, reduction).reshape(count)
    return _weighted_sum(chunk, student, teacher, temperature, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(chunk, student, teacher, temperature):
    """Every token's loss, [tokens]; the gradient computes the logits again."""
    return _values(chunk, student, teacher, temperature)


_each.defvjp(
    lambda chunk, *arrays: (_values(chunk, *arrays), arrays),
    lambda chunk, arrays, g: (_values_and_gradients(chunk, *arrays, g)[1], None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(chunk, student, teacher, temperature, weights):
    """Σ weights · losses; its cotangent is one number, so gradients are ready beforehand."""
    return jnp.sum(weights * _values(chunk, student, teacher, temperature))


def _weighted_sum_forward(chunk, student, teacher, temperature, weights):
    values, gradients = _values_and_gradients(chunk, student, teacher, temperature, weights)
    return jnp.sum(weights * values), gradients


def _weighted_sum_backward(chunk, gradients, g):
    return jax.tree.map(lambda v: (g * v).astype(v.dtype), gradients), None, None, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _values(chunk, student, teacher, temperature):
    """The loss of each token, [tokens] float32."""

    def one_chunk(hidden):
        return losses.kl(
            _logits(hidden[0], *student[1:]), _logits(hidden[1], *teacher[1:]), temperature
        )

    values = jax.lax.map(one_chunk, _split((student[0], teacher[0]), chunk))
    return values.reshape(-1)[: len(student[0])]


def _values_and_gradients(chunk, student, teacher, temperature, weights):
    """The loss of each token, and the gradients of Σ weights · losses in the form of `student`."""
    hidden, head, bias = student

    def one_chunk(sums, xs):
        student_hidden, teacher_hidden, weight = xs
        student_logits = _logits(student_hidden, head, bias)
        teacher_logits = _logits(teacher_hidden, *teacher[1:])
        # The compiler shares the softmaxes with those of the gradient below.
        values = losses.kl(student_logits, teacher_logits, temperature)
        q, p = (
            jnp.exp(jax.nn.log_softmax(v / temperature)) for v in (student_logits, teacher_logits)
        )
        to_logits = (weight * temperature)[:, None] * (q - p)
        to_bias = None if bias is None else jnp.sum(to_logits, axis=0)
        # As if the layer had made logits of its own dtype: a float32 product is slow where a
        # bfloat16 one is not.
        to_logits = to_logits.astype(jnp.result_type(student_hidden, head))
        to_head = _dot(student_hidden.T, to_logits)
        to_hidden = _dot(to_logits, head.T).astype(hidden.dtype)
        return jax.tree.map(jnp.add, sums, (to_head, to_bias)), (values, to_hidden)

    zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, jnp.float32), (head, bias))
    sums, (values, to_hidden) = jax.lax.scan(
        one_chunk, zeros, _split((hidden, teacher[0], weights), chunk)
    )
    to_hidden = to_hidden.reshape(-1, hidden.shape[1])[: len(hidden)]
    sums = jax.tree.map(lambda v, like: v.astype(like.dtype), sums, (head, bias))
    return values.reshape(-1)[: len(hidden)], (to_hidden, *sums)


def _logits(hidden, head, bias):
    logits = _dot(hidden, head)
    return logits if bias is None else logits + bias.astype(jnp.float32)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _split(arrays, chunk):
    """Each [tokens, ...] as [chunks, tokens of a chunk, ...], with zeros after the last token."""
    tokens = len(arrays[0])
    chunks = max(1, math.ceil(tokens / chunk))
    size = max(1, math.ceil(tokens / chunks))

    def split(x):
        padding = [(0, chunks * size - tokens)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(split, arrays)
