"""Sparse targets against loops in float64: what the k largest get wrong, and samples do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.distill import losses, sparse

TEMPERATURES = [0.5, 4.0]
CLASSES = 7


def _logits(rows=5, classes=CLASSES):
    rng = np.random.default_rng(0)
    return [(2 * rng.normal(size=(rows, classes))).astype(np.float32) for _ in range(2)]


def _softmax(logits, temperature):
    powers = np.exp(np.asarray(logits, np.float64) / temperature)
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 3, CLASSES])
def test_top_k_targets_are_the_largest_probabilities_of_all_classes(k, temperature):
    _, teacher = _logits()
    indices, log_probs = sparse.top_k_targets(jnp.asarray(teacher), k, temperature)
    assert indices.dtype == jnp.int32
    assert log_probs.dtype == jnp.float32
    p = _softmax(teacher, temperature)
    for row in range(5):
        order = sorted(range(CLASSES), key=lambda c: -p[row, c])[:k]
        assert indices[row].tolist() == order
        np.testing.assert_allclose(log_probs[row], np.log(p[row, order]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [0, CLASSES + 1])
def test_k_must_be_a_number_of_classes(k):
    with pytest.raises(ValueError, match=f"k must be 1 to {CLASSES}.*given {k}"):
        sparse.top_k_targets(jnp.zeros((2, CLASSES)), k, 1.0)


def _bucket_kl(student, teacher, k, temperature):
    """KL of distributions over k + 1 classes, the last one made of all that are left."""
    values = []
    for q, p in zip(_softmax(student, temperature), _softmax(teacher, temperature), strict=True):
        order = np.argsort(-p)
        p, q = ([*v[order[:k]], v[order[k:]].sum()] for v in (p, q))
        values.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
    return temperature**2 * np.array(values)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 3, CLASSES])
def test_tail_is_one_more_class(k, temperature):
    student, teacher = _logits()
    targets = sparse.top_k_targets(jnp.asarray(teacher), k, temperature)
    loss = lambda s: sparse.top_k_kl(s, *targets, temperature)
    value, pull = jax.vjp(loss, jnp.asarray(student))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(
        value, _bucket_kl(student, teacher, k, temperature), rtol=1e-5, atol=2e-6 * temperature**2
    )
    # T (q - p) on the k classes; the others share out T (q_tail - p_tail) as the student does.
    p, q = _softmax(teacher, temperature), _softmax(student, temperature)
    expected = np.empty_like(p)
    for row in range(5):
        order = np.argsort(-p[row])
        kept, rest = order[:k], order[k:]
        expected[row, kept] = q[row, kept] - p[row, kept]
        for c in rest:
            expected[row, c] = q[row, c] * (1 - p[row, rest].sum() / q[row, rest].sum())
    np.testing.assert_allclose(pull(jnp.ones(5))[0], temperature * expected, atol=2e-6)


def test_all_classes_give_the_dense_kl():
    student, teacher = map(jnp.asarray, _logits())
    targets = sparse.top_k_targets(teacher, CLASSES, 4.0)
    dense = losses.kl(student, teacher, 4.0)
    for tail in (True, False):
        value = sparse.top_k_kl(student, *targets, 4.0, tail)
        np.testing.assert_allclose(value, dense, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_plain_top_k_is_biased_by_what_it_cuts_off(k):
    temperature = 2.0
    student, teacher = _logits()
    targets = sparse.top_k_targets(jnp.asarray(teacher), k, temperature)
    plain = lambda s: sparse.top_k_kl(s, *targets, temperature, tail=False).sum()
    dense = lambda s: losses.kl(s, jnp.asarray(teacher), temperature).sum()
    p = _softmax(teacher, temperature)
    cut = np.where(p >= np.sort(p)[:, -k, None], p, 0)
    cut /= cut.sum(-1, keepdims=True)
    # The same for every student: the teacher's tail, pushed down, and its head, pushed up.
    bias = temperature * (p - cut)
    assert np.abs(bias).max() > 0.1
    for at in (student, teacher):
        gradients = [np.asarray(jax.grad(loss)(jnp.asarray(at))) for loss in (plain, dense)]
        np.testing.assert_allclose(gradients[0] - gradients[1], bias, atol=2e-6)
    # So its optimum is a student without a tail, not the teacher; with a bucket it is the teacher.
    optimum = jnp.asarray(np.where(cut > 0, teacher, -1e3), jnp.float32)
    assert float(plain(optimum)) == pytest.approx(0, abs=1e-5)
    assert float(plain(jnp.asarray(teacher))) > 0.1
    bucket = lambda s: sparse.top_k_kl(s, *targets, temperature).sum()
    np.testing.assert_allclose(jax.grad(bucket)(jnp.asarray(teacher)), 0 * bias, atol=2e-6)
    assert float(bucket(optimum)) > 1


def test_extreme_logits_are_finite():
    certain = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 1e4]])
    for student in (-certain, certain):
        targets = sparse.top_k_targets(certain, 1, 1.0)
        value, pull = jax.vjp(lambda s, t=targets: sparse.top_k_kl(s, *t, 1.0), student)
        # The teacher has no tail, so the value is -log q of its class; two others share row 1.
        expected = [2e4, 1e4 + np.log(2)] if student[0, 0] < 0 else [0, 0]
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert np.isfinite(pull(jnp.ones(2))[0]).all()


def test_a_tail_that_1_minus_p_would_round_to_0():
    tail, gap = 3e-8, 1e6
    student = jnp.array([[gap, 0.0, 0.0]])  # log q_tail = log 2 - gap
    value = sparse.top_k_kl(student, jnp.array([[0]]), jnp.log1p(jnp.array([[-tail]])), 1.0)
    np.testing.assert_allclose(value, [tail * (np.log(tail) - np.log(2) + gap) - tail], rtol=1e-4)


def test_a_mass_that_rounding_leaves_above_1_has_no_tail():
    log_probs = jnp.full((1, 2), np.float32(np.log(0.5))) + jnp.float32(1e-6)
    value = sparse.top_k_kl(jnp.zeros((1, 3)), jnp.array([[0, 1]]), log_probs, 1.0)
    np.testing.assert_allclose(value, [np.log(1.5)], atol=1e-5)


DRAWS = 2000


def _many_targets(teacher, samples, temperature, proposal):
    """`DRAWS` independent targets of one example."""
    return sparse.sample_targets(
        np.tile(teacher, (DRAWS, 1)),
        samples,
        temperature,
        seed=3,
        counters=np.arange(DRAWS),
        proposal_temperature=proposal,
    )


@pytest.mark.parametrize("proposal", [0.0, 0.7, 1.0, 1.3])
def test_samples_come_from_the_proposal_and_are_weighted_by_the_ratio(proposal):
    _, teacher = _logits(1)
    indices, weights = _many_targets(teacher[0], 4, 2.0, proposal)
    assert indices.dtype == np.int32
    assert weights.dtype == np.float32
    assert indices.shape == weights.shape == (DRAWS, 4)
    p = _softmax(teacher[0], 2.0)
    r = p**proposal / np.sum(p**proposal)
    for c in range(CLASSES):
        drawn = indices == c
        spread = np.sqrt(r[c] * (1 - r[c]) / indices.size)
        assert abs(drawn.mean() - r[c]) < 4 * spread
        np.testing.assert_allclose(weights[drawn], p[c] / r[c] / 4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("proposal", "temperature"), [(1.0, 1.0), (0.7, 1.0), (1.0, 4.0)])
def test_sampled_gradient_is_the_dense_one_on_average(proposal, temperature):
    student, teacher = (v[0] for v in _logits(1))
    indices, weights = _many_targets(teacher, 3, temperature, proposal)
    students = jnp.tile(student, (DRAWS, 1))
    loss = lambda s: sparse.sampled_kl(s, indices, weights, temperature)
    values, pull = jax.vjp(loss, students)
    gradients = np.asarray(pull(jnp.ones(DRAWS))[0], np.float64)
    p, q = _softmax(teacher, temperature), _softmax(student, temperature)
    dense = temperature * (q - p)
    error = gradients.std(0) / np.sqrt(DRAWS)
    assert (np.abs(gradients.mean(0) - dense) < 4 * error).all()
    # The test can see a bias: that of the 3 largest is many standard errors.
    largest = sparse.top_k_targets(jnp.asarray(teacher), 3, temperature)
    plain = jax.grad(lambda s: sparse.top_k_kl(s, *largest, temperature, tail=False))(student)
    assert (np.abs(plain - dense) > 6 * error).any()
    # The value is that of KL plus the teacher's entropy, which is the cross-entropy.
    cross_entropy = -(temperature**2) * np.sum(p * np.log(q))
    assert abs(np.mean(values) - cross_entropy) < 4 * np.std(values) / np.sqrt(DRAWS)


def test_sampled_loss_by_hand():
    student = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]))
    indices, weights = jnp.array([[0, 0], [2, 1]]), jnp.array([[0.25, 0.5], [1.0, 0.1]])
    expected = [-0.75 * np.log(0.5), -np.log(0.6) - 0.1 * np.log(0.2)]
    np.testing.assert_allclose(sparse.sampled_kl(student, indices, weights, 1.0), expected, 1e-6)
    squared = sparse.sampled_kl(4 * student, indices, weights, 4.0)
    np.testing.assert_allclose(squared, 16 * np.array(expected), 1e-6)


def test_draws_depend_on_seed_and_counter_alone():
    _, teacher = _logits(6)
    draw = lambda rows, seed=0: sparse.sample_targets(
        teacher[rows], 50, 1.0, seed=seed, counters=np.asarray(rows) + 10
    )
    indices, weights = draw(range(6))
    again = [draw([5, 1]), draw([3])]
    np.testing.assert_array_equal(indices[[5, 1, 3]], np.concatenate([i for i, _ in again]))
    np.testing.assert_array_equal(weights[[5, 1, 3]], np.concatenate([w for _, w in again]))
    assert (draw(range(6), seed=1)[0] != indices).any(axis=1).all()
    # Equal examples at other counters are drawn anew.
    twice = sparse.sample_targets(teacher[[0, 0]], 50, 1.0, seed=0, counters=[0, 1])[0]
    assert (twice[0] != twice[1]).any()


def test_a_class_without_probability_is_never_drawn():
    teacher = np.array([[-1e4, 0.0, -1e4, 0.0, -1e4]])
    indices, weights = sparse.sample_targets(teacher, 500, 1.0, seed=0, counters=[0])
    assert set(indices[0].tolist()) == {1, 3}
    np.testing.assert_allclose(weights, np.full((1, 500), 1 / 500), rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"samples": 0}, {"temperature": 0.0}, {"proposal_temperature": -1.0}, {"seed": -1}],
)
def test_arguments_of_sampling_out_of_range_are_refused(change):
    arguments = {"samples": 2, "temperature": 1.0, "seed": 0, "counters": [0], **change}
    with pytest.raises(ValueError, match="samples must be at least 1, temperature positive"):
        sparse.sample_targets(np.zeros((1, 3)), **arguments)
    with pytest.raises(ValueError, match="counters"):
        sparse.sample_targets(np.zeros((2, 3)), 2, 1.0, seed=0, counters=[0])


def _losses(teacher):
    targets = sparse.top_k_targets(teacher, 2, 2.0)
    samples = sparse.sample_targets(teacher, 2, 2.0, seed=0, counters=np.arange(len(teacher)))
    return {
        "top_k": lambda s, **kw: sparse.top_k_kl(s, *targets, 2.0, **kw),
        "sampled": lambda s, **kw: sparse.sampled_kl(s, *map(jnp.asarray, samples), 2.0, **kw),
    }


@pytest.mark.parametrize("name", ["top_k", "sampled"])
def test_masked_examples_do_not_count_even_if_they_are_nan(name):
    student, teacher = map(jnp.asarray, _logits())
    loss = _losses(teacher)[name]
    plain = np.asarray(loss(student))
    mask = jnp.array([1, 0, 1, 1, 0])
    broken = student.at[jnp.array([1, 4])].set(jnp.nan)
    np.testing.assert_allclose(loss(broken, mask=mask), plain * np.asarray(mask), rtol=1e-6)
    mean, gradient = jax.value_and_grad(lambda s: loss(s, mask=mask, reduction="mean"))(broken)
    assert float(mean) == pytest.approx(plain[[0, 2, 3]].mean(), rel=1e-5)
    expected = jax.grad(lambda s: loss(s)[jnp.array([0, 2, 3])].mean())(student)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert float(loss(student, reduction="sum")) == pytest.approx(plain.sum(), rel=1e-5)


@pytest.mark.parametrize("name", ["top_k", "sampled"])
def test_bfloat16_students_are_compared_in_float32(name):
    student, teacher = map(jnp.asarray, _logits())
    loss = _losses(teacher)[name]
    half = student.astype(jnp.bfloat16)
    assert loss(half).dtype == jnp.float32
    np.testing.assert_array_equal(loss(half), loss(half.astype(jnp.float32)))


def test_no_gradient_flows_to_the_targets():
    student, teacher = map(jnp.asarray, _logits())
    indices, log_probs = sparse.top_k_targets(teacher, 2, 1.0)
    for loss in (sparse.top_k_kl, sparse.sampled_kl):
        gradient = jax.grad(lambda v, f=loss: f(student, indices, v, 1.0).sum())(log_probs)
        np.testing.assert_array_equal(gradient, np.zeros((5, 2)))


@pytest.mark.parametrize("loss", [sparse.top_k_kl, sparse.sampled_kl])
@pytest.mark.parametrize("shapes", [((5, 2), (5, 3)), ((1, 2), (1, 2)), ((2,), (2,))])
def test_shapes_are_never_broadcast(loss, shapes):
    with pytest.raises(ValueError, match="must have one shape"):
        loss(jnp.zeros((5, 7)), jnp.zeros(shapes[0], jnp.int32), jnp.zeros(shapes[1]), 1.0)
