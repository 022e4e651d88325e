"""Logits of −inf: classes that an output rules out, by the convention 0 log 0 = 0."""

import functools

import host_scores
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logit_oracles import central_differences, logits
from scipy.special import log_softmax, rel_entr, softmax

from kdq import entropy
from kdq.distill import cache, cache_key, chunked_kl, losses, sparse

SHAPE, RULED_OUT, T = (4, 6), (0, 3), 2.0
LABELS = np.array([1, 2, 4, 5])
LIVE = np.setdiff1d(np.arange(SHAPE[1]), RULED_OUT)


def _masked(z):
    return np.where(np.isin(np.arange(SHAPE[1]), RULED_OUT), -np.inf, z).astype(np.float32)


STUDENT, TEACHER = logits(SHAPE, spread=2.0)


def _kl(a, b):
    """Of logits in float64; scipy's rel_entr is 0 for 0 log 0 and inf for a > 0 = b."""
    p, q = (softmax(np.float64(v) / T, axis=-1) for v in (a, b))
    return T**2 * rel_entr(p, q).sum(-1)


def _mixture(a, b, weight):
    """Logits at temperature T of weight p + (1 − weight) q."""
    p, q = (softmax(np.float64(v) / T, axis=-1) for v in (a, b))
    with np.errstate(divide="ignore"):
        return T * np.log(weight * p + (1 - weight) * q)


def _jensen_shannon(s, t, beta=0.5):
    m = _mixture(t, s, beta)
    return beta * _kl(t, m) + (1 - beta) * _kl(s, m)


def _standardized(z):
    live = np.float64(z)[:, LIVE]
    whole = np.full(SHAPE, -np.inf)
    whole[:, LIVE] = (live - live.mean(-1, keepdims=True)) / live.std(-1, keepdims=True)
    return whole


def _cross_entropy(s, t, smoothing=0.0):
    return -log_softmax(np.float64(s), axis=-1)[range(SHAPE[0]), LABELS]


def _dkd(s, t):
    """α TCKD + 8 NCKD, the second over the others that are not ruled out."""
    rows, total = range(SHAPE[0]), 0.0
    p, q = (softmax(np.float64(v) / T, axis=-1) for v in (t, s))
    two = [np.stack([v[rows, LABELS], 1 - v[rows, LABELS]], -1) for v in (p, q)]
    total = rel_entr(*two).sum(-1)
    for v in (p, q):
        v[rows, LABELS] = 0
    p, q = (v / v.sum(-1, keepdims=True) for v in (p, q))
    return T**2 * (total + 8 * rel_entr(p, q).sum(-1))


# name: (loss of (student, teacher), the same in float64, who rules classes out where it is finite)
CASES = {
    "kl": (lambda s, t: losses.kl(s, t, T), lambda s, t: _kl(t, s), "both teacher"),
    "reverse_kl": (lambda s, t: losses.reverse_kl(s, t, T), _kl, "both student"),
    "jensen_shannon": (
        lambda s, t: losses.jensen_shannon(s, t, T),
        _jensen_shannon,
        "both teacher student",
    ),
    "jensen_shannon at 0": (
        lambda s, t: losses.jensen_shannon(s, t, T, jnp.float32(0)),
        lambda s, t: _kl(t, s),
        "both teacher",
    ),
    "jensen_shannon at 1": (
        lambda s, t: losses.jensen_shannon(s, t, T, jnp.float32(1)),
        _kl,
        "both student",
    ),
    "skew_kl": (
        lambda s, t: losses.skew_kl(s, t, T),
        lambda s, t: _kl(t, _mixture(t, s, 0.1)),
        "both teacher student",
    ),
    "dkd": (lambda s, t: losses.dkd(s, t, LABELS, T), _dkd, "both teacher"),
    "standardized_kl": (
        lambda s, t: losses.standardized_kl(s, t, T),
        lambda s, t: _kl(_standardized(t), _standardized(s)),
        "both",
    ),
    "soft_mse": (
        losses.soft_mse,
        lambda s, t: np.square(np.float64(s)[:, LIVE] - t[:, LIVE]).mean(-1),
        "both",
    ),
    "hard_label": (
        losses.hard_label,
        lambda s, t: -log_softmax(np.float64(s), axis=-1)[range(SHAPE[0]), t.argmax(-1)],
        "both teacher",
    ),
    "cross_entropy": (
        lambda s, t: losses.cross_entropy(s, LABELS),
        _cross_entropy,
        "both student",
    ),
    "of two top classes": (
        lambda s, t: sparse.top_k_kl(s, *sparse.top_k_targets(t, 2, T), T),
        lambda s, t: _top_two(s, t),
        "both teacher",
    ),
    "of all classes by top_k": (
        lambda s, t: sparse.top_k_kl(s, *sparse.top_k_targets(t, 6, T), T),
        lambda s, t: _kl(t, s),
        "both teacher",
    ),
    "of the live classes by top_k": (
        lambda s, t: sparse.top_k_kl(s, *sparse.top_k_targets(t, 4, T), T),
        lambda s, t: _kl(t, s),
        "both",
    ),
    "ptq": (
        lambda s, t: T**2 * entropy.kl(t / T, s / T),
        lambda s, t: _kl(t, s),
        "both teacher",
    ),
}


def _top_two(s, t):
    p, q = (softmax(np.float64(v) / T, axis=-1) for v in (t, s))
    top = np.argsort(-p, axis=-1)[:, :2]
    p, q = (np.take_along_axis(v, top, -1) for v in (p, q))
    p, q = (np.concatenate([v, 1 - v.sum(-1, keepdims=True)], -1) for v in (p, q))
    return T**2 * rel_entr(p, q).sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _graded(loss, student, teacher):
    value, pull = jax.vjp(lambda s: loss(s, teacher), student)
    return value, pull(jnp.ones(value.shape))[0]


@pytest.mark.parametrize(
    ("name", "who"), [(name, who) for name, case in CASES.items() for who in case[2].split()]
)
def test_value_and_gradient_are_the_limits(name, who):
    loss, oracle, _ = CASES[name]
    student = STUDENT if who == "teacher" else _masked(STUDENT)
    teacher = TEACHER if who == "student" else _masked(TEACHER)
    value, gradient = _graded(loss, student, teacher)
    np.testing.assert_allclose(value, oracle(student, teacher), rtol=2e-5, atol=1e-6)
    # Of the logits that are numbers; the limit is 0 at those that are not.
    free = np.isfinite(student)

    def total(x):
        return oracle(np.where(free, x, student), teacher).sum()

    slopes = central_differences(total, np.where(free, np.float64(student), 0))
    np.testing.assert_allclose(gradient, np.where(free, slopes, 0), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_mass_on_a_class_that_is_ruled_out_is_infinite(who):
    student, teacher = (
        (_masked(STUDENT), TEACHER) if who == "student" else (STUDENT, _masked(TEACHER))
    )
    loss = losses.kl if who == "student" else losses.reverse_kl
    value, gradient = _graded(loss, student, teacher)
    np.testing.assert_array_equal(value, np.full(4, np.inf))
    if who == "student":  # where the gradient goes on as it does for every student: q − p
        q, p = (softmax(np.float64(v), axis=-1) for v in (student, teacher))
        np.testing.assert_allclose(gradient, q - p, atol=1e-6)


def test_a_label_or_a_smoothing_over_a_class_that_is_ruled_out_is_infinite():
    student = _masked(STUDENT)
    value = losses.cross_entropy(student, np.array([0, 2, 3, 5]))
    np.testing.assert_array_equal(np.isposinf(value), [True, False, True, False])
    assert np.isposinf(losses.cross_entropy(student, LABELS, 0.1)).all()


def test_a_teacher_that_predicts_nothing_has_no_value():
    broken = np.array(TEACHER)
    broken[0], broken[1, 2], broken[2, 1] = -np.inf, np.inf, np.nan
    for name in ("kl", "reverse_kl", "jensen_shannon", "skew_kl", "standardized_kl", "hard_label"):
        value = np.asarray(getattr(losses, name)(STUDENT, broken))
        np.testing.assert_array_equal(np.isnan(value), [True, True, True, False], err_msg=name)
    assert np.isnan(losses.dist(STUDENT, broken)).all()  # it belongs to the batch


def test_dkd_where_only_the_label_is_left():
    """Two classes of which one is ruled out: the divergence of (label, rest), and no NCKD."""
    teacher, student = np.float32([[1.0, -np.inf]]), np.float32([[0.5, 0.25]])
    value, gradient = _graded(lambda s, t: losses.dkd(s, t, np.array([0])), student, teacher)
    q = softmax(np.float64(student))
    np.testing.assert_allclose(value, -np.log(q[:, 0]), rtol=1e-6)
    np.testing.assert_allclose(gradient, q - [[1, 0]], atol=1e-6)


def test_dist_counts_a_class_that_never_occurs_as_constant():
    """Its column has no correlation, which adds 1 / classes; the others are as without it."""
    student, teacher = _masked(STUDENT), _masked(TEACHER)
    value, gradient = _graded(losses.dist, student, teacher)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.asarray(gradient)[:, RULED_OUT], 0)
    inter = lambda s, t: [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)]
    q, p = (softmax(np.float64(v), axis=-1) for v in (student, teacher))
    intra = np.mean(inter(q.T[LIVE], p.T[LIVE])) * 4 / 6 + 2 / 6
    np.testing.assert_allclose(value, np.array(inter(q, p)) + intra, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_words_that_a_bias_rules_out(reduction):
    rng = np.random.default_rng(1)
    hidden, head = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 3, 6))
    hidden, head = np.float32(hidden), np.float32(head)
    bias = np.float32([-np.inf, 0, 0.5, -np.inf, 0, 0])

    @jax.jit
    def of(student_hidden, student_head):
        return chunked_kl(
            student_hidden,
            student_head,
            hidden[1],
            head[1],
            T,
            chunk=3,
            reduction=reduction,
            student_bias=bias,
            teacher_bias=bias,
        ).sum()

    value, gradients = jax.value_and_grad(of, (0, 1))(hidden[0], head[0])

    def oracle(h, w):
        return _kl(np.float64(hidden[1]) @ head[1] + bias, h @ w + bias).sum()

    np.testing.assert_allclose(value, oracle(np.float64(hidden[0]), head[0]), rtol=1e-5)
    for i, gradient in enumerate(gradients):
        arguments = [np.float64(hidden[0]), np.float64(head[0])]

        def moved(x, i=i, arguments=arguments):
            return oracle(*(x if j == i else a for j, a in enumerate(arguments)))

        np.testing.assert_allclose(gradient, central_differences(moved, arguments[i]), atol=1e-4)


@pytest.mark.parametrize("proposal", [0.0, 0.5, 1.0])
def test_sampled_targets_never_hold_a_class_that_is_ruled_out(proposal):
    teacher = _masked(TEACHER)
    options = {"seed": 0, "counters": np.arange(4), "proposal_temperature": proposal}
    indices, weights = sparse.sample_targets(teacher, 4000, T, **options)
    assert np.isin(indices, LIVE).all()
    drawn = np.stack([np.bincount(i, w, 6) for i, w in zip(indices, weights, strict=True)])
    np.testing.assert_allclose(drawn, softmax(np.float64(teacher) / T, axis=-1), atol=0.03)
    value, gradient = _graded(
        lambda s, t: sparse.sampled_kl(s, indices, weights, T), _masked(STUDENT), teacher
    )
    log_q = log_softmax(np.float64(_masked(STUDENT)) / T, axis=-1)
    want = -(T**2) * np.where(drawn > 0, drawn * np.where(drawn > 0, log_q, 0), 0).sum(-1)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("target", [cache_key.Dense(), cache_key.TopK(k=6, temperature=T)])
def test_a_cache_keeps_minus_infinity_and_nothing_else_that_is_not_finite(tmp_path, target):
    key = cache_key.CacheKey(
        teacher="t",
        teacher_model={},
        dataset="d",
        split="s",
        data_digest="x",
        mean=0.0,
        std=1.0,
        num_classes=6,
        target=target,
    )
    records = cache_key.make_records(key, _masked(TEACHER), np.arange(4))
    kept = cache.write_cache(tmp_path / "kept", key, [records], length=4).load()
    name = "logits" if target.kind == "dense" else "log_probs"
    np.testing.assert_array_equal(kept[name], records[name])
    assert np.isneginf(kept[name]).sum() == 8
    for bad in (np.inf, np.nan):
        changed = {**records, name: np.where(np.isneginf(records[name]), bad, records[name])}
        with pytest.raises(cache.CacheError, match=f"{name} is not finite"):
            cache.write_cache(tmp_path / "broken", key, [changed], length=4)


def test_divergence_of_finished_models():
    np.testing.assert_allclose(
        host_scores.kl_divergence(_masked(TEACHER), STUDENT),
        rel_entr(softmax(np.float64(_masked(TEACHER)), -1), softmax(np.float64(STUDENT), -1)).sum(
            -1
        ),
        rtol=1e-12,
    )
    assert np.isposinf(host_scores.kl_divergence(TEACHER, _masked(STUDENT))).all()
    np.testing.assert_array_equal(host_scores.kl_divergence(*[_masked(TEACHER)] * 2), np.zeros(4))


@pytest.mark.parametrize("labels", [[1, 2, 2**32 + 1, -(2**32)], [1, 2, 6, -1]])
def test_a_label_of_64_bits_is_not_one_of_32(labels):
    value = losses.cross_entropy(STUDENT, np.array(labels, np.int64))
    np.testing.assert_array_equal(np.isnan(value), [False, False, True, True])
    value = losses.dkd(STUDENT, TEACHER, np.array([1, 2, 2**64 - 1, 3], np.uint64), T)
    np.testing.assert_array_equal(np.isnan(value), [False, False, True, False])


ONE = np.zeros((4, 1), np.float32)


@pytest.mark.parametrize(
    "loss",
    [
        losses.kl,
        losses.reverse_kl,
        losses.jensen_shannon,
        losses.skew_kl,
        lambda s, t: losses.dkd(s, t, np.zeros(4, np.int32)),
        losses.dist,
        losses.standardized_kl,
        losses.hard_label,
        lambda s, t: losses.cross_entropy(s, np.zeros(4, np.int32)),
        lambda s, t: sparse.top_k_targets(t, 1, T),
        lambda s, t: sparse.top_k_kl(s, np.zeros((4, 1), np.int32), s, T),
        lambda s, t: sparse.sampled_kl(s, np.zeros((4, 2), np.int32), np.ones((4, 2)), T),
        lambda s, t: chunked_kl(s, np.ones((1, 1)), t, np.ones((1, 1))),
        lambda s, t: jax.eval_shape(losses.kl, s, t),
    ],
)
def test_one_class_is_refused_since_its_softmax_says_nothing(loss):
    with pytest.raises(ValueError, match=r"at least 2 classes.*soft_mse"):
        loss(ONE, ONE + 1)


def test_soft_mse_compares_outputs_of_one_class():
    np.testing.assert_array_equal(losses.soft_mse(ONE, ONE + 3), np.full(4, 9))
