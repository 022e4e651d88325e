"""The losses on logits against float64 NumPy written from the papers, one example at a time."""

import functools
import itertools

import jax
import jax.numpy as jnp
import logit_oracles as oracles
import numpy as np
import pytest
from logit_oracles import each
from logit_oracles import logits as _logits
from logit_oracles import probabilities as _probabilities
from scipy.stats import entropy

from kdq.distill import losses

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]
LABELS = np.array([3, 0, 9, 3, 5, 1])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(6, 10), (10,), (2, 3, 4)])
def test_value_is_t_squared_times_scipys_relative_entropy(shape, temperature):
    student, teacher = _logits(shape)
    q, p = _probabilities(student, teacher, temperature)
    expected = temperature**2 * entropy(p, q, axis=-1)
    value = losses.kl(jnp.asarray(student), jnp.asarray(teacher), temperature)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    # It is no symmetric distance: the teacher's distribution comes first.
    assert not np.allclose(expected, temperature**2 * entropy(q, p, axis=-1), rtol=1e-2)


def test_temperature_is_1_unless_given_and_may_be_traced():
    student, teacher = map(jnp.asarray, _logits())
    np.testing.assert_array_equal(losses.kl(student, teacher), losses.kl(student, teacher, 1.0))
    traced = jax.jit(losses.kl)(student, teacher, jnp.float32(4))
    np.testing.assert_allclose(traced, losses.kl(student, teacher, 4.0), rtol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_is_t_times_the_difference_of_probabilities(temperature):
    student, teacher = _logits()
    q, p = _probabilities(student, teacher, temperature)
    weights = np.arange(1.0, 7.0)

    def loss(student, teacher):
        return jnp.sum(weights * losses.kl(student, teacher, temperature))

    to_student, to_teacher = jax.grad(loss, argnums=(0, 1))(student, teacher)
    expected = weights[:, None] * temperature * (q - p)
    np.testing.assert_allclose(to_student, expected, atol=1e-5 * temperature)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_array_equal(to_teacher, np.zeros((6, 10)))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_extreme_logits_are_exact_and_their_gradients_finite(temperature):
    student = jnp.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    teacher = jnp.array([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [1e4, 1e4, 1e4]])
    # The teacher is certain of class 1, to which the student gives log-probability -2e4 / T.
    value, pull = jax.vjp(lambda s: losses.kl(s, teacher, temperature), student)
    np.testing.assert_allclose(value, [2e4 * temperature, 0, 0], rtol=1e-6)
    certain = [[temperature, -temperature, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(pull(jnp.ones(3))[0], certain, atol=1e-6)


def test_zero_if_and_only_if_the_distributions_are_equal():
    student, teacher = map(jnp.asarray, _logits())
    np.testing.assert_array_equal(losses.kl(teacher, teacher, 4.0), np.zeros(6))
    shifted = teacher + jnp.arange(6.0)[:, None]  # the same distribution
    np.testing.assert_allclose(losses.kl(shifted, teacher, 4.0), np.zeros(6), atol=1e-5)
    assert (losses.kl(student, teacher, 4.0) > 0.1).all()
    nudged = teacher.at[:, 0].add(0.1)
    assert (losses.kl(nudged, teacher, 1.0) > 1e-6).all()


def test_bfloat16_logits_are_compared_in_float32():
    student, teacher = (v.astype(jnp.bfloat16) for v in _logits())
    q, p = _probabilities(student.astype(np.float64), teacher.astype(np.float64), 4.0)
    value, pull = jax.vjp(lambda s: losses.kl(s, jnp.asarray(teacher), 4.0), jnp.asarray(student))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 16 * entropy(p, q, axis=-1), rtol=2e-5)
    (gradient,) = pull(jnp.ones(6))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(gradient, np.float64), 4 * (q - p), rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("shapes", [((6, 10), (6, 9)), ((6, 10), (1, 10)), ((10,), (6, 10))])
def test_shapes_are_never_broadcast(shapes):
    student, teacher = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match="must have one shape") as error:
        losses.kl(student, teacher)
    assert str(shapes[0]) in str(error.value)
    assert str(shapes[1]) in str(error.value)


def task_loss(student_logits, teacher_logits, labels, label_smoothing, **kwargs):
    del teacher_logits
    return losses.cross_entropy(student_logits, labels, label_smoothing, **kwargs)


# The oracle and the options beside the temperature.
CASES = {
    losses.kl: (each(oracles.kl), {}),
    losses.reverse_kl: (each(oracles.reverse_kl), {}),
    losses.jensen_shannon: (each(oracles.jensen_shannon), {"beta": 0.3}),
    losses.skew_kl: (each(oracles.skew_kl), {"alpha": 0.2}),
    losses.dkd: (each(oracles.dkd), {"labels": LABELS, "alpha": 1.5, "beta": 4.0}),
    losses.dist: (oracles.dist, {"beta": 2.0, "gamma": 0.7}),
    losses.standardized_kl: (each(oracles.standardized_kl), {}),
    losses.soft_mse: (each(oracles.soft_mse), {}),
    losses.hard_label: (each(oracles.hard_label), {}),
    task_loss: (each(oracles.cross_entropy), {"labels": LABELS, "label_smoothing": 0.1}),
}
HAS_TEMPERATURE = set(CASES) - {losses.soft_mse, losses.hard_label, task_loss}
ONES = np.ones(6, np.float32)
every_loss = pytest.mark.parametrize("loss", CASES, ids=lambda loss: loss.__name__)


def _options(loss, temperature=4.0):
    options = dict(CASES[loss][1])
    return {**options, "temperature": temperature} if loss in HAS_TEMPERATURE else options


def _rows(options, rows):
    return {k: v[rows] if k == "labels" else v for k, v in options.items()}


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(loss, student, teacher, weights, options):
    """Jitted with every option as data: a loss that branched on one would not compile."""
    value, pull = jax.vjp(lambda s, t: loss(s, t, **options), student, teacher)
    return value, *pull(weights)


def _assert_gradient(actual, expected):
    """Within 1e-5 of the largest entry: others may be 0."""
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("loss", "temperature"),
    [(loss, t) for loss in CASES for t in (TEMPERATURES if loss in HAS_TEMPERATURE else [1.0])],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_value_and_gradient_are_the_papers(loss, temperature):
    # Logits of size 1: at T = 20 a sum whose terms cancel would be wrong by 1e-4.
    student, teacher = _logits(spread=1.0)
    oracle, options = CASES[loss][0], _options(loss, temperature)
    weights = np.arange(1, 7, dtype=np.float32)
    value, to_student, to_teacher = _value_and_gradients(loss, student, teacher, weights, options)
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, oracle(s, t, **options), rtol=1e-5)
    slopes = oracles.central_differences(lambda s: weights @ oracle(s, t, **options), s)
    _assert_gradient(to_student, slopes)
    np.testing.assert_array_equal(to_teacher, np.zeros((6, 10)))


@pytest.mark.parametrize(
    "loss",
    [losses.jensen_shannon, losses.skew_kl, losses.dkd, losses.dist],
    ids=lambda loss: loss.__name__,
)
def test_numeric_options_have_derivatives(loss):
    student, teacher = _logits()
    oracle, options = CASES[loss][0], _options(loss)
    numbers = {k: v for k, v in options.items() if k != "labels"}
    total = lambda numbers: jnp.sum(loss(student, teacher, **{**options, **numbers}))
    given = jax.jit(jax.grad(total))(numbers)
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    for name, number in numbers.items():
        of_one = lambda x, name=name: oracle(s, t, **{**options, name: x[0]}).sum()
        expected = oracles.central_differences(of_one, np.array([number]))
        np.testing.assert_allclose(given[name], expected[0], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "loss", [losses.dkd, losses.dist, losses.standardized_kl], ids=lambda loss: loss.__name__
)
def test_leading_dimensions_are_one_batch(loss):
    student, teacher = _logits()
    options = _options(loss)
    flat, _, _ = _value_and_gradients(loss, student, teacher, ONES, options)
    folded = {k: v.reshape(2, 3) if k == "labels" else v for k, v in options.items()}
    mask = np.ones((2, 3), bool)
    of_folded = jax.jit(lambda s, t: loss(s, t, mask=mask, **folded))
    value = of_folded(student.reshape(2, 3, 10), teacher.reshape(2, 3, 10))
    np.testing.assert_allclose(value, flat.reshape(2, 3), rtol=1e-6)


def _masked(loss, kept):
    """Student, teacher and options with garbage in every row but `kept`, which the mask hides."""
    mask = np.zeros(6, np.float32)
    mask[kept] = 1
    garbage = np.resize(np.array([np.nan, np.inf, -1e4, 7.0], np.float32), (6, 10))
    dirty = [np.where(mask[:, None] == 1, v, garbage) for v in _logits()]
    options = {**_options(loss), "mask": mask}
    if "labels" in options:
        options["labels"] = np.where(mask == 1, LABELS, -5)
    return *dirty, options


@every_loss
@pytest.mark.parametrize("kept", [[0, 2, 3], [4], []], ids=["half", "one", "none"])
def test_a_mask_is_as_if_the_rows_were_not_there(loss, kept):
    student, teacher, options = _masked(loss, kept)
    weights = np.arange(1, 7, dtype=np.float32)
    result = _value_and_gradients(loss, student, teacher, weights, options)
    expected, slopes = np.zeros(6), np.zeros((6, 10))
    if kept:
        s, t = (v[kept].astype(np.float64) for v in (student, teacher))
        of_kept = lambda s: CASES[loss][0](s, t, **_rows(_options(loss), kept))
        expected[kept] = of_kept(s)
        slopes[kept] = oracles.central_differences(lambda s: weights[kept] @ of_kept(s), s)
    # No absolute tolerance: what is masked is exactly 0.
    np.testing.assert_allclose(result[0], expected, rtol=1e-5)
    _assert_gradient(result[1], slopes)
    hidden = np.delete(np.arange(6), kept)
    np.testing.assert_array_equal(result[1][hidden], np.zeros((len(hidden), 10)))
    np.testing.assert_array_equal(result[2], np.zeros((6, 10)))


@every_loss
def test_reductions_are_over_the_examples_that_count(loss):
    student, teacher, options = _masked(loss, [0, 2, 3])

    @jax.jit
    def reduced(options):
        return [loss(student, teacher, **options, reduction=r) for r in ("none", "sum", "mean")]

    values, total, mean = reduced(options)
    assert values.shape == (6,)
    expected = np.asarray(values, np.float64).sum()
    assert expected > 0
    np.testing.assert_allclose([total, mean], [expected, expected / 3], rtol=1e-6)


@every_loss
@pytest.mark.parametrize("temperature", [0.5, 20.0])
def test_extreme_logits_are_finite(loss, temperature):
    high, low = np.full(10, 1e4), np.full(10, -1e4)
    one = np.where(np.arange(10) == 3, high, low)
    two = np.where(np.arange(10) % 5 == 3, high, low)
    mixed = np.resize([1e4, -1e4, 0.0, 9999.0], 10)
    kinds = [np.zeros(10), high, low, one, -one, two, mixed, -mixed]
    pairs = np.array(list(itertools.product(kinds, kinds)), np.float32)[:60].reshape(10, 6, 2, 10)
    options = _options(loss, temperature)
    for pair in pairs:
        student, teacher = pair[:, 0], pair[:, 1]
        result = _value_and_gradients(loss, student, teacher, ONES, options)
        assert all(np.isfinite(v).all() for v in result)
        only = {**options, "mask": np.eye(6, dtype=np.float32)[2]}
        result = _value_and_gradients(loss, student, teacher, ONES, only)
        assert all(np.isfinite(v).all() for v in result)


@every_loss
def test_a_batch_of_one_is_an_example_as_any(loss):
    options = _options(loss)
    for i in (1, 4):
        student, teacher = (v[i : i + 1] for v in _logits())
        given = _rows(options, slice(i, i + 1))
        value, to_student, _ = _value_and_gradients(loss, student, teacher, ONES[:1], given)
        s, t = student.astype(np.float64), teacher.astype(np.float64)
        oracle = lambda s, t=t, given=given: CASES[loss][0](s, t, **given)
        np.testing.assert_allclose(value, oracle(s), rtol=1e-5)
        slopes = oracles.central_differences(lambda s, oracle=oracle: oracle(s).sum(), s)
        _assert_gradient(to_student, slopes)


@pytest.mark.slow
@every_loss
def test_bfloat16_is_only_how_the_logits_are_stored(loss):
    student, teacher = (v.astype(jnp.bfloat16) for v in _logits())
    options = _options(loss)
    value, to_student, _ = _value_and_gradients(loss, student, teacher, ONES, options)
    wide = [v.astype(np.float32) for v in (student, teacher)]
    expected, slopes, _ = _value_and_gradients(loss, *wide, ONES, options)
    np.testing.assert_array_equal(value, expected)
    assert to_student.dtype == jnp.bfloat16
    np.testing.assert_array_equal(to_student, slopes.astype(jnp.bfloat16))


@every_loss
def test_a_shift_of_the_logits_counts_only_in_the_squared_error(loss):
    student, teacher = _logits()
    shift = np.arange(1, 7, dtype=np.float32)[:, None]
    value = lambda s, t: _value_and_gradients(loss, s, t, ONES, _options(loss))[0]
    plain, shifted = value(student, teacher), value(student + shift, teacher - shift)
    if loss is losses.soft_mse:
        np.testing.assert_allclose(value(teacher + shift, teacher), shift[:, 0] ** 2, rtol=1e-5)
        assert not np.isclose(shifted, plain, rtol=0.1).any()
    else:
        np.testing.assert_allclose(shifted, plain, rtol=1e-5)


@every_loss
def test_wrong_arguments_are_named(loss):
    # Under eval_shape: what is checked are shapes, so nothing need be computed.
    student, teacher = _logits()
    options = _options(loss)
    call = lambda *logits, **more: jax.eval_shape(lambda: loss(*logits, **options | more))
    with pytest.raises(ValueError, match=r"\('none', 'mean', 'sum'\), given 'avg'"):
        call(student, teacher, reduction="avg")
    for shape in ((5,), (6, 1), (6, 10), ()):
        with pytest.raises(ValueError, match="mask must have") as error:
            call(student, teacher, mask=jnp.ones(shape))
        assert f"(6,), given {shape}" in str(error.value)
    if loss is not task_loss:
        with pytest.raises(
            ValueError, match=r"\(6, 10\) and teacher_logits \(6, 9\) must have one"
        ):
            call(student, teacher[:, :9])
    if "labels" in options:
        with pytest.raises(ValueError, match=r"shape \(6,\), given \(3,\)"):
            call(student, teacher, labels=LABELS[:3])
        with pytest.raises(ValueError, match="integers, given float32"):
            call(student, teacher, labels=LABELS.astype(np.float32))
