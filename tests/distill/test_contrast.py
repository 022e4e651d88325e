"""The memory of the contrastive loss: its normalizers, its banks, and who writes to them."""

import jax
import numpy as np
import pytest
import scipy.stats
from feature_oracles import BANKS, EXAMPLES, FRESH_MEMORY, IDS, MEMORY, NEGATIVES, contrastive

from kdq.distill import contrast

STUDENT, TEACHER = np.random.default_rng(5).normal(size=(2, 5, 6)).astype(np.float32) * 3
step = jax.jit(contrast.contrastive)
draw = jax.jit(contrast.draw_negatives, static_argnums=(2, 3))


def _unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _normalizer(embedding, bank, rows, temperature):
    scores = []
    for i in rows:
        for index in (IDS[i], *NEGATIVES[i]):
            scores.append(np.exp(_unit(embedding)[i] @ bank[index].astype(float) / temperature))
    return EXAMPLES * np.mean(scores)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0, 2, 3]])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_first_batch_sets_the_normalizers_for_good(rows, temperature):
    mask = np.isin(np.arange(5), rows)
    values, memory = step(STUDENT, TEACHER, FRESH_MEMORY, IDS, NEGATIVES, temperature, mask=mask)
    z = [
        _normalizer(STUDENT, BANKS[1], rows, temperature),
        _normalizer(TEACHER, BANKS[0], rows, temperature),
    ]
    found = [memory.student_log_z, memory.teacher_log_z]
    np.testing.assert_allclose(found, np.log(z), rtol=1e-5)
    expected = contrastive(
        STUDENT, TEACHER, IDS, NEGATIVES, banks=BANKS, constants=z, temperature=temperature
    )
    np.testing.assert_allclose(values, np.where(mask, expected, 0), rtol=1e-5)
    _, later = step(-STUDENT, TEACHER[::-1], memory, IDS, NEGATIVES, temperature)
    np.testing.assert_array_equal([later.student_log_z, later.teacher_log_z], found)


def test_a_first_batch_without_examples_leaves_all_as_it_was():
    values, memory = step(STUDENT, TEACHER, FRESH_MEMORY, IDS, NEGATIVES, mask=np.zeros(5, bool))
    np.testing.assert_array_equal(values, np.zeros(5))
    jax.tree.map(np.testing.assert_array_equal, memory, FRESH_MEMORY)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_banks_are_moving_averages_of_length_1(momentum):
    _, memory = step(STUDENT, TEACHER, MEMORY, IDS, NEGATIVES, momentum=momentum)
    found = (memory.student_bank, memory.teacher_bank)
    for bank, before, embedding in zip(found, BANKS, (STUDENT, TEACHER), strict=True):
        expected = before.astype(np.float64)
        for i, index in enumerate(IDS):
            mixed = momentum * expected[index] + (1 - momentum) * _unit(embedding)[i]
            expected[index] = mixed / np.linalg.norm(mixed)
        np.testing.assert_allclose(bank, expected, rtol=1e-5, atol=1e-6)
        others = np.setdiff1d(np.arange(EXAMPLES), IDS)
        np.testing.assert_array_equal(bank[others], before[others])


def test_of_repeated_ids_the_last_that_counts_writes_and_masked_rows_never_do():
    ids = np.array([3, 5, 3, 3, -1], np.int32)
    mask = np.array([1, 1, 1, 0, 0], np.float32)
    _, memory = step(STUDENT, TEACHER, MEMORY, ids, NEGATIVES, mask=mask)
    keep = np.array([2, 1])
    _, expected = step(STUDENT[keep], TEACHER[keep], MEMORY, ids[keep], NEGATIVES[keep])
    jax.tree.map(np.testing.assert_array_equal, memory, expected)
    assert not np.array_equal(memory.student_bank[3], BANKS[0][3])


def test_an_embedding_that_cancels_its_row_leaves_it_at_length_1():
    student = np.zeros_like(STUDENT)
    _, memory = step(student, TEACHER, MEMORY, IDS, NEGATIVES, momentum=0.0)
    np.testing.assert_array_equal(memory.student_bank, BANKS[0])


def test_small_temperatures_do_not_overflow():
    @jax.jit
    def run(student):
        def loss(student):
            return contrast.contrastive(
                student, TEACHER, FRESH_MEMORY, IDS, NEGATIVES, 1e-3, reduction="sum"
            )

        return jax.value_and_grad(loss, has_aux=True)(student)

    (value, memory), gradient = run(STUDENT)
    assert np.isfinite(value)
    assert np.isfinite(memory.student_log_z)
    assert np.isfinite(gradient).all()
    assert gradient.any()


def test_no_gradient_flows_through_the_memory():
    @jax.jit
    def gradients(student, memory):
        def after(student, memory):
            _, memory = contrast.contrastive(student, TEACHER, memory, IDS, NEGATIVES)
            return sum(leaf.sum() for leaf in jax.tree.leaves(memory))

        def loss(memory):
            return contrast.contrastive(student, TEACHER, memory, IDS, NEGATIVES, reduction="sum")[
                0
            ]

        return jax.grad(after, (0, 1))(student, memory), jax.grad(loss)(memory)

    assert not any(np.any(g) for g in jax.tree.leaves(gradients(STUDENT, MEMORY)))


def test_memory_starts_with_rows_of_length_1_and_no_normalizers():
    memory = jax.jit(contrast.init_memory, static_argnums=(1, 2))(jax.random.key(0), 2000, 6)
    memory = jax.tree.map(np.asarray, memory)
    for bank in (memory.student_bank, memory.teacher_bank):
        np.testing.assert_allclose(np.linalg.norm(bank, axis=-1), np.ones(2000), rtol=1e-6)
        # Uniform on the sphere: no mean, and a variance of 1 / dim along every axis.
        np.testing.assert_allclose(bank.mean(0), np.zeros(6), atol=5 / np.sqrt(2000 * 6))
        np.testing.assert_allclose(np.var(bank, axis=0), np.full(6, 1 / 6), rtol=0.15)
    assert np.abs(memory.student_bank - memory.teacher_bank).max() > 0.1
    assert memory.student_log_z == memory.teacher_log_z == -np.inf


def test_negatives_are_uniform_over_the_other_examples():
    ids = np.array([0, 3, 6])
    drawn = np.asarray(draw(jax.random.key(1), ids, 7, 6000))
    for own, row in zip(ids, drawn, strict=True):
        counts = np.bincount(row, minlength=7)
        assert counts[own] == 0
        assert len(counts) == 7
        assert scipy.stats.chisquare(np.delete(counts, own)).pvalue > 1e-3
    with pytest.raises(ValueError, match="at least 2 to draw others, given 1"):
        contrast.draw_negatives(jax.random.key(1), ids, 1, 4)


WRONG = [
    ({"student_embedding": STUDENT[:, :5], "teacher_embedding": TEACHER[:, :5]}, "one dim"),
    ({"student_embedding": STUDENT[0], "teacher_embedding": TEACHER[0]}, r"\[batch, dim\]"),
    ({"ids": IDS[:, None]}, r"ids \(5, 1\).*student_embedding \(5, 6\)"),
    ({"negatives": NEGATIVES[:4]}, r"negatives \(4, 4\).*student_embedding \(5, 6\)"),
    ({"negatives": NEGATIVES[:, :0]}, r"negatives \(5, 0\) must hold at least one"),
    ({"memory": MEMORY.replace(teacher_bank=MEMORY.teacher_bank[:3])}, "one shape"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_shapes_that_do_not_fit_are_refused(wrong, message):
    right = {
        "student_embedding": STUDENT,
        "teacher_embedding": TEACHER,
        "memory": MEMORY,
        "ids": IDS,
        "negatives": NEGATIVES,
    }
    with pytest.raises(ValueError, match=message):
        contrast.contrastive(**(right | wrong))
