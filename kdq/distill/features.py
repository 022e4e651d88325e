"""Losses on intermediate features: pure functions, one value an example, in float32.

All take `mask` [batch] of 0 and 1: a masked example gives 0, and influences no other, not even by
a mean, a range or a pair; and `reduction`, see `reduction.reduce`. "mean" is the loss of the paper.
No gradient flows to the teacher, except where it says so.

Those that compare examples with each other are in `relations`, those that contrast them in
`contrast`, and those on sequences of tokens in `attention`; all are reached from here.
"""

import jax
import jax.numpy as jnp

from kdq.distill import inputs
from kdq.distill.attention import attention_relation, hidden_states
from kdq.distill.contrast import (
    ContrastiveMemory,
    contrastive,
    draw_negatives,
    info_nce,
    init_memory,
)
from kdq.distill.options import Bits, Power, Variance
from kdq.distill.reduction import reduce
from kdq.distill.relations import relational_angle, relational_distance, similarity_preserving
from kdq.quantize import grid
from kdq.types import Array

__all__ = [
    "ContrastiveMemory",
    "attention_relation",
    "attention_transfer",
    "contrastive",
    "draw_negatives",
    "hidden_states",
    "hint",
    "info_nce",
    "init_memory",
    "quantized_feature",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "variational_information",
]


def hint(
    student: Array, teacher: Array, *, mask: Array | None = None, reduction: str = "none"
) -> Array:
    """Mean squared difference of the features (FitNets, arXiv:1412.6550).

    The paper has half the squared norm of the difference; the mean is the same up to a constant,
    which makes weights comparable between layers.

    Args:
      student: [batch, ...] float, already of the teacher's shape (see `adapters`).
      teacher: the same shape.
      mask: [batch] of 0 and 1.
      reduction: "none", "mean" or "sum".

    Returns:
      [batch] float32, or a scalar.

    Raises:
      ValueError: two shapes.
    """
    student, teacher = inputs.pair(student, teacher, mask)
    return reduce(_example_mean(jnp.square(student - teacher)), mask, reduction)


def attention_transfer(
    student: Array,
    teacher: Array,
    power: Power = 2.0,
    *,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """Mean squared difference of the maps of activity, each of length 1 (arXiv:1612.03928).

    The map of an example is Q = mean over channels of |a|^power, Q / ‖Q‖₂ over all positions; that
    of zeros is 0. The value is the *mean* over positions of the squared difference, as in the
    authors' code; their equation has the norm of the difference.

    Args:
      student: [batch, height, width, channels] float, or any axes of positions.
      teacher: the same but for the number of channels.
      power: > 0; above 1 it stresses the strongest activations.
      mask: [batch] of 0 and 1.
      reduction: "none", "mean" or "sum".

    Returns:
      [batch] float32, or a scalar.

    Raises:
      ValueError: other axes than the last differ, or there are none of positions.
    """
    student, teacher = inputs.pair(student, teacher, mask, shared=-1)
    if student.ndim < 3:
        raise ValueError(f"student {student.shape} must be [batch, positions..., channels]")
    maps = (_attention_map(x, power) for x in (student, teacher))
    return reduce(_example_mean(jnp.square(next(maps) - next(maps))), mask, reduction)


def _attention_map(x: Array, power: Array | float) -> Array:
    # The map does not depend on the scale, and large features to a power would overflow.
    size = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), keepdims=True)
    size = jax.lax.stop_gradient(jnp.where(size < jnp.finfo(jnp.float32).tiny, 1.0, size))
    x = jnp.abs(x) / size
    zero = x == 0  # 0^p has no gradient in p, and none in 0 if p < 1
    raised = jnp.where(zero, 0.0, jnp.power(jnp.where(zero, 1.0, x), power))
    energy = jnp.mean(raised, axis=-1)
    return inputs.unit(energy.reshape(x.shape[0], -1))


def variational_information(
    student_mean: Array,
    teacher: Array,
    raw_variance: Array,
    epsilon: Variance = 1e-5,
    *,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """Negative log-likelihood of the teacher under a Gaussian around the student (VID).

    Mean over elements of ½ ((t - μ)² / σ² + log σ²), in nats and without the constant ½ log 2π,
    with σ² = softplus(raw_variance) + epsilon for each channel: minus the variational bound on
    the mutual information, up to constants (arXiv:1904.05835). It can be negative. Gradients flow
    to `student_mean` and to `raw_variance`. The authors start at σ² = 5: raw_variance =
    log(expm1(5 - epsilon)).

    Args:
      student_mean: [batch, ..., channels] float, the teacher's feature as predicted from the
        student's.
      teacher: the same shape.
      raw_variance: [channels] float.
      epsilon: the smallest variance, > 0.
      mask: [batch] of 0 and 1.
      reduction: "none", "mean" or "sum".

    Returns:
      [batch] float32, or a scalar.

    Raises:
      ValueError: two shapes, or a variance that is not one for each channel.
    """
    mean, target = inputs.pair(student_mean, teacher, mask)
    if raw_variance.shape != teacher.shape[-1:]:
        raise ValueError(
            f"raw_variance {raw_variance.shape} must have the channels of teacher {teacher.shape}"
        )
    variance = jax.nn.softplus(raw_variance.astype(jnp.float32)) + epsilon
    nll = 0.5 * (jnp.square(target - mean) / variance + jnp.log(variance))
    return reduce(_example_mean(nll), mask, reduction)


def quantized_feature(
    student: Array,
    teacher: Array,
    bits: Bits = 4,
    *,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """Mean squared difference from the teacher's feature, quantized (QFD, arXiv:2307.10638).

    The target is a uniform `bits`-bit rounding of the teacher's feature with one scale for the
    tensor: on the unsigned grid over [0, max] if nothing is negative (after a ReLU), else on the
    signed grid over ±max|t|. The range is that of the examples of this batch that count. The paper
    trains the range in a phase of its own and then freezes it; for that, give `hint` the rounded
    feature (`quantize.ste.fake_quantize`).

    Args:
      student: [batch, ...] float, already of the teacher's shape.
      teacher: the same shape.
      bits: of the target; may be traced. One bit: 0 and max, or ±max|t|.
      mask: [batch] of 0 and 1.
      reduction: "none", "mean" or "sum".

    Returns:
      [batch] float32, or a scalar.

    Raises:
      ValueError: two shapes.
    """
    student, teacher = inputs.pair(student, teacher, mask)
    low, high = jnp.min(teacher), jnp.max(teacher)  # of masked examples zeros: within the range
    signed, unsigned = (grid.from_range(low, high, bits, signed=s) for s in (True, False))
    quantizer = jax.tree.map(lambda s, u: jnp.where(low < 0, s, u), signed, unsigned)
    target = grid.from_codes(grid.to_codes(teacher, quantizer), quantizer)
    return reduce(_example_mean(jnp.square(student - target)), mask, reduction)


def _example_mean(x: Array) -> Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
