"""Contrastive losses: an example's two embeddings against those of other examples.

Embeddings are [batch, dim] float, projected, of one shape, and scaled to length 1 here. Gradients
flow to *both*, as the teacher's projection trains too: the caller stops the gradient at the
teacher's feature. `temperature` > 0; `mask` [batch] of 0 and 1; `reduction` "none" for [batch]
float32, else a scalar. ValueError for shapes that do not fit together.
"""

import flax.struct
import jax
import jax.numpy as jnp

from kdq.distill.reduction import Momentum, Temperature, live, real, reduce, same_shape, unit
from kdq.types import Array


class ContrastiveMemory(flax.struct.PyTreeNode):
    """The memory of `contrastive`: embeddings of every training example.

    The rows of both banks have length 1. The normalizers are -inf until the first batch with an
    example that counts, and constant from then on.
    """

    student_bank: Array  # [examples, dim] float32; row i is the embedding of the example with id i
    teacher_bank: Array  # the same shape
    student_log_z: Array  # scalar float32: log Z of student embeddings against the teacher's bank
    teacher_log_z: Array  # scalar float32: log Z of teacher embeddings against the student's bank


def init_memory(key: Array, num_examples: int, dim: int) -> ContrastiveMemory:
    """Random directions, and normalizers not yet estimated.

    The authors draw from a cube, whose points have length 1 in the mean; here all have.
    """
    banks = unit(jax.random.normal(key, (2, num_examples, dim)))
    unknown = jnp.full((), -jnp.inf, jnp.float32)
    return ContrastiveMemory(banks[0], banks[1], unknown, unknown)


def draw_negatives(key: Array, ids: Array, num_examples: int, k: int) -> Array:
    """For each example `k` others, uniform and with replacement: [batch, k] int32, never itself.

    The authors' code draws from all examples, now and then the positive itself. `ids` are [batch]
    int in [0, num_examples). ValueError if there is no other example.
    """
    if num_examples < 2:
        raise ValueError(f"num_examples must be at least 2 to draw others, given {num_examples}")
    others = jax.random.randint(key, (ids.shape[0], k), 0, num_examples - 1)
    return others + (others >= ids[:, None])


def contrastive(
    student_embedding: Array,
    teacher_embedding: Array,
    memory: ContrastiveMemory,
    ids: Array,
    negatives: Array,
    temperature: Temperature = 0.07,
    momentum: Momentum = 0.5,
    *,
    mask: Array | None = None,
    reduction: str = "none",
) -> tuple[Array, ContrastiveMemory]:
    """Contrastive representation distillation with a memory bank (CRD, arXiv:1910.10699).

    With u the student's embedding, v_j the teacher's bank and p_j = exp(⟨u, v_j⟩ / T) / Z, the
    value is the noise-contrastive estimate -log h(p_i) - Σ_negatives log(1 - h(p_j)), where
    h(p) = p / (p + k / N) for k negatives of N examples; and the same once more with student and
    teacher exchanged.

    Z is N times the mean of exp(⟨u, v_j⟩ / T) in the first batch, then constant. Afterwards each
    example's row of either bank becomes momentum × itself + (1 - momentum) × the embedding, scaled
    to length 1, or stays if that is 0. If an id occurs more than once, the last row that counts
    writes. The authors add 1e-7 to k / N; in log space nothing needs it.

    Args:
      student_embedding: [batch, dim].
      teacher_embedding: the same shape.
      memory: of all N training examples.
      ids: [batch] int in [0, N); masked rows may hold anything.
      negatives: [batch, k] int in [0, N), see `draw_negatives`.
      temperature: T.
      momentum: in [0, 1), of the banks.
      mask: masked rows neither count in Z nor write to the banks.
      reduction: of the values.

    Returns:
      The values, and the memory for the next step, which carries no gradient.
    """
    _check_embeddings(student_embedding, teacher_embedding)
    batch, dim = student_embedding.shape
    same_shape(memory.student_bank, memory.teacher_bank, "student_bank", "teacher_bank")
    if memory.student_bank.shape[1:] != (dim,):
        raise ValueError(
            f"student_embedding {student_embedding.shape} and student_bank "
            f"{memory.student_bank.shape} must have one dim"
        )
    for name, array, ndim in (("ids", ids, 1), ("negatives", negatives, 2)):
        if array.ndim != ndim or array.shape[0] != batch:
            raise ValueError(
                f"{name} {array.shape} must have {ndim} axes, the first that of "
                f"student_embedding {student_embedding.shape}"
            )
    if negatives.shape[1] < 1:
        raise ValueError(f"negatives {negatives.shape} must hold at least one an example")

    counts = live(mask, batch)
    memory = jax.lax.stop_gradient(memory)
    student, teacher = (unit(real(x, mask)) for x in (student_embedding, teacher_embedding))
    drawn = jnp.where(counts[:, None] > 0, jnp.concatenate([ids[:, None], negatives], axis=1), 0)
    student_values, student_log_z = _noise_contrast(
        student, memory.teacher_bank, drawn, memory.student_log_z, temperature, counts
    )
    teacher_values, teacher_log_z = _noise_contrast(
        teacher, memory.student_bank, drawn, memory.teacher_log_z, temperature, counts
    )
    # Rows that count and whose id no later row that counts has.
    position = jnp.arange(batch)
    later = (ids[:, None] == ids) & (position[:, None] < position) & (counts > 0)
    writes = (counts > 0) & ~later.any(-1)
    updated = ContrastiveMemory(
        student_bank=_write(memory.student_bank, student, ids, writes, momentum),
        teacher_bank=_write(memory.teacher_bank, teacher, ids, writes, momentum),
        student_log_z=student_log_z,
        teacher_log_z=teacher_log_z,
    )
    values = reduce(student_values + teacher_values, mask, reduction)
    return values, jax.lax.stop_gradient(updated)


def info_nce(
    student_embedding: Array,
    teacher_embedding: Array,
    temperature: Temperature = 0.07,
    *,
    mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """In-batch contrast of each student's embedding with all teachers' (cf. arXiv:1910.10699).

    -log softmax_j(⟨u_i, v_j⟩ / T)_i in nats, with the student's embeddings u as queries and the
    teacher's v as keys; masked rows are no keys, and it is 0 if only one example counts. One
    direction only, student to teacher; for a symmetric loss call it both ways. The bound of the
    paper, with InfoNCE (arXiv:1807.03748) in place of the memory bank.
    """
    _check_embeddings(student_embedding, teacher_embedding)
    student, teacher = (unit(real(x, mask)) for x in (student_embedding, teacher_embedding))
    batch = student.shape[0]
    scores = jnp.matmul(student, teacher.T, precision="highest") / temperature
    # Its own key always counts, so that no row is without any. Not -inf: its gradient is NaN.
    keys = (live(mask, batch) > 0) | jnp.eye(batch, dtype=bool)
    log_p = jax.nn.log_softmax(jnp.where(keys, scores, -1e30))
    return reduce(-jnp.diagonal(log_p), mask, reduction)


def _noise_contrast(
    embedding: Array, bank: Array, drawn: Array, log_z: Array, temperature: Array, counts: Array
) -> tuple[Array, Array]:
    """Values [batch] and log Z, for rows `drawn` of the bank of which the first is the positive."""
    examples, count = bank.shape[0], drawn.shape[1]
    scores = jnp.einsum("bkd,bd->bk", bank[drawn], embedding, precision="highest") / temperature
    fixed = jax.lax.stop_gradient(scores)
    counted = jnp.maximum(counts.sum(), 1) * count
    mean = jax.nn.logsumexp(fixed, where=(counts > 0)[:, None]) - jnp.log(counted)
    first = jnp.where(counts.any(), mean + jnp.log(examples), -jnp.inf)
    log_z = jnp.where(jnp.isneginf(log_z), first, log_z)
    # If nothing has counted yet, any number will do: all values are masked.
    log_p = scores - jnp.where(jnp.isneginf(log_z), 0.0, log_z)
    log_odds = log_p - jnp.log((count - 1) / examples)
    values = jax.nn.softplus(-log_odds[:, 0]) + jax.nn.softplus(log_odds[:, 1:]).sum(-1)
    return values, log_z


def _write(bank: Array, embedding: Array, ids: Array, writes: Array, momentum: Array) -> Array:
    rows = unit(momentum * bank[ids] + (1 - momentum) * embedding)
    rows = jnp.where(jnp.any(rows != 0, axis=-1, keepdims=True), rows, bank[ids])
    # An index beyond the bank drops the row; those left are unique, so their order is no matter.
    return bank.at[jnp.where(writes, ids, bank.shape[0])].set(rows, mode="drop")


def _check_embeddings(student: Array, teacher: Array) -> None:
    same_shape(student, teacher, "student_embedding", "teacher_embedding")
    if student.ndim != 2:
        raise ValueError(f"student_embedding {student.shape} must be [batch, dim]")
