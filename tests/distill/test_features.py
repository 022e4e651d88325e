"""What every loss on features promises, against float64 oracles; and the simpler losses' own."""

import functools

import feature_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_oracles import BATCH, CASES, close, numerical_gradient

from kdq.distill import features

WEIGHTS = np.array([1.0, -2.0, 0.5, 3.0, 1.5])


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@functools.cache
def _compiled(case, masked):
    """(mask, weights, *arrays) -> values, their mean, and the gradients of their weighted sum."""
    which = (*case.trained(), *case.teachers)

    def run(mask, weights, *arrays):
        mask = mask if masked else None

        def total(*chosen):
            given = list(arrays)
            for index, array in zip(which, chosen, strict=True):
                given[index] = array
            values = case.loss(*given, mask=mask)
            return jnp.sum(weights * values), values

        chosen = [arrays[i] for i in which]
        gradients, values = jax.grad(total, tuple(range(len(which))), has_aux=True)(*chosen)
        mean = case.loss(*arrays, mask=mask, reduction="mean")
        return values, mean, dict(zip(which, gradients, strict=True))

    return jax.jit(run)


def _run(case, arrays, mask=None):
    weights = WEIGHTS[: len(arrays[0])]
    given = weights if mask is None else jnp.asarray(mask)
    return _compiled(case, mask is not None)(given, weights, *arrays)


def _expected(case, arrays, weights=None):
    """The oracle's values, and of their weighted sum the gradients to what trains."""
    arrays = [x.astype(np.float64) if x.dtype == np.float32 else x for x in arrays]
    gradients = {}
    for index in case.trained() if weights is not None else ():

        def total(x, index=index):
            return weights @ case.oracle(*arrays[:index], x, *arrays[index + 1 :])

        gradients[index] = numerical_gradient(total, arrays[index])
    return case.oracle(*arrays), gradients


def test_values_and_gradients_are_the_papers(case):
    arrays = case.arrays()
    expected, expected_gradients = _expected(case, arrays, WEIGHTS)
    assert np.ptp(expected) > 1e-3
    values, mean, gradients = _run(case, arrays)
    assert values.shape == (BATCH,)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)
    for index, gradient in expected_gradients.items():
        assert np.abs(gradient).max() > 1e-3
        close(gradients[index], gradient)
    for index in case.teachers:
        np.testing.assert_array_equal(gradients[index], np.zeros_like(arrays[index]))


def test_a_mask_is_the_same_as_leaving_the_rows_out(case):
    arrays, kept = case.arrays(), np.array([0, 2, 3])
    expected, expected_gradients = _expected(case, case.rows(arrays, kept), WEIGHTS[kept])
    mask = np.zeros(BATCH, np.float32)
    mask[kept] = 1
    for array in arrays[: len(case.shapes)]:
        array[1], array[4] = np.nan, np.inf
    values, mean, gradients = _run(case, arrays, mask)
    np.testing.assert_allclose(values[kept], expected, rtol=1e-5)
    np.testing.assert_array_equal(values[mask == 0], [0, 0])
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)
    for index, gradient in expected_gradients.items():
        of_batch = index < len(case.shapes)
        close(gradients[index][kept] if of_batch else gradients[index], gradient)
        assert not of_batch or not np.any(gradients[index][mask == 0])


def test_masks_of_all_but_one_and_of_all(case):
    arrays = case.arrays()
    only = case.rows(arrays, np.array([3]))
    expected = _expected(case, only)[0][0]
    close_to_it = {"rtol": 1e-5, "atol": 1e-7}  # relations of one example to itself are 0
    values, mean, gradients = _run(case, arrays, np.float32([0, 0, 0, 1, 0]))
    np.testing.assert_allclose(values, [0, 0, 0, expected, 0], **close_to_it)
    np.testing.assert_allclose(mean, expected, **close_to_it)
    alone, _, gradients_alone = _run(case, only)  # a batch of 1
    np.testing.assert_allclose(alone, [expected], **close_to_it)
    assert all(np.isfinite(g).all() for g in (*gradients.values(), *gradients_alone.values()))
    values, mean, gradients = _run(case, arrays, np.zeros(BATCH, np.float32))
    assert not np.any(values)
    assert mean == 0
    assert not any(np.any(g) for g in gradients.values())


@pytest.mark.parametrize("kind", ["zero", "one example repeated", "student zero", "1e4"])
def test_degenerate_features_have_finite_values_and_gradients(case, kind):
    make = {
        "zero": lambda x, is_teacher: 0 * x,
        "one example repeated": lambda x, is_teacher: np.repeat(x[:1], BATCH, axis=0),
        "student zero": lambda x, is_teacher: is_teacher * x,
        "1e4": lambda x, is_teacher: 1e4 * np.sign(x),
    }
    arrays = case.arrays()
    for index in range(len(case.shapes)):
        arrays[index] = make[kind](arrays[index], np.float32(index in case.teachers))
    values, _, gradients = _run(case, arrays)
    assert np.isfinite(values).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    if kind == "zero" and case.zero_at_teacher:
        np.testing.assert_array_equal(values, np.zeros(BATCH))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.zero_at_teacher])
def test_zero_only_where_the_student_is_the_teacher(name):
    case, arrays = CASES[name], CASES[name].arrays()
    half = len(case.shapes) // 2
    alike = [arrays[i % half] for i in range(2 * half)]
    np.testing.assert_allclose(jax.jit(case.loss)(*alike), np.zeros(BATCH), atol=1e-6)
    assert (_run(case, arrays)[0] > 1e-3).all()


def test_bfloat16_features_are_compared_in_float32(case):
    arrays, count = case.arrays(), len(case.shapes)
    short = [jnp.asarray(x, jnp.bfloat16) if i < count else x for i, x in enumerate(arrays)]
    rounded = [np.asarray(x, np.float32) if i < count else x for i, x in enumerate(short)]
    values, _, gradients = _run(case, short)
    expected, _, expected_gradients = _run(case, rounded)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    for index in case.students:
        assert gradients[index].dtype == jnp.bfloat16
        close(gradients[index], expected_gradients[index], rtol=2**-8)  # half its last place


def test_shapes_are_never_broadcast(case):
    arrays = [jnp.asarray(x) for x in case.arrays()]
    fewer = arrays[1][:1]
    with pytest.raises(ValueError, match="must have one shape") as error:
        case.loss(arrays[0], fewer, *arrays[2:])
    assert str(arrays[0].shape) in str(error.value)
    assert str(fewer.shape) in str(error.value)
    with pytest.raises(ValueError, match=r"mask must have the batch's shape \(5,\)"):
        case.loss(*arrays, mask=jnp.ones((5, 1)))


OPTIONS = [
    ("attention_transfer", "power", 1.0),
    ("attention_transfer", "power", 0.5),
    ("attention_transfer", "power", 3.0),
    ("variational_information", "epsilon", 0.5),
    ("quantized_feature", "bits", 2),
    ("quantized_feature", "bits", 8),
    ("info_nce", "temperature", 0.5),
]


@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_options_are_obeyed_and_may_be_traced(name, option, value):
    case, arrays = CASES[name], CASES[name].arrays()
    doubles = [x.astype(np.float64) for x in arrays]
    expected = case.oracle(*doubles, **{option: value})
    assert not np.allclose(expected, case.oracle(*doubles), rtol=1e-2)
    traced = jax.jit(lambda x: case.loss(*map(jnp.asarray, arrays), **{option: x}))
    np.testing.assert_allclose(traced(jnp.float32(value)), expected, rtol=1e-5)


def test_attention_of_zero_and_of_huge_maps():
    student, teacher = CASES["attention_transfer"].arrays()
    student[0], student[1, 0, 0] = 0, 0
    student[2] *= 1e10

    @jax.jit
    def run(student, power):
        loss = lambda *args: features.attention_transfer(args[0], teacher, args[1])
        values, pull = jax.vjp(loss, student, power)
        return values, *pull(jnp.ones(BATCH))

    for power in (0.5, 1.0, 2.0, 8.0):
        values, to_student, to_power = run(student, jnp.float32(power))
        expected = oracles.attention_transfer(
            student.astype(np.float64), teacher.astype(np.float64), power
        )
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        assert np.isfinite(to_student).all()
        assert np.isfinite(to_power)
        assert not to_student[0].any()
        assert to_student[3].any()


def test_the_target_of_a_rectified_feature_has_no_negative_codes():
    # By hand: 2 bits over [0, 3] are 0, 1, 2, 3; over ±3 they are ±3 and 0; one bit is 0, 3 or ±3.
    teacher = jnp.array([[0.4, 1.6, 3.0], [2.4, 0.6, 0.1]])
    student = jnp.zeros((2, 3))

    @jax.jit
    def targets(teacher, bits):
        gradient = jax.grad(lambda s: features.quantized_feature(s, teacher, bits).sum())(student)
        return -gradient * 3 / 2  # of the mean of (s - t)² at s = 0

    np.testing.assert_allclose(targets(teacher, 2), [[0, 2, 3], [2, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(targets(teacher, 1), [[0, 3, 3], [3, 0, 0]], atol=1e-6)
    signed = teacher.at[0, 0].set(-0.4)
    np.testing.assert_allclose(targets(signed, 2), [[0, 3, 3], [3, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(targets(signed, 1), [[-3, 3, 3], [3, 3, 3]], atol=1e-6)


def test_variance_that_fits_the_residuals_is_the_likeliest():
    rng = np.random.default_rng(3)
    scales = np.array([0.1, 1.0, 3.0])
    teacher = jnp.asarray(scales * rng.normal(size=(400, 3)), jnp.float32)
    best = np.mean(np.square(np.asarray(teacher, float)), axis=0)  # the maximum of the likelihood
    raw = jnp.asarray(np.log(np.expm1(best - 1e-5)), jnp.float32)

    @jax.jit
    def nll(raw):
        return features.variational_information(
            jnp.zeros_like(teacher), teacher, raw, reduction="mean"
        )

    np.testing.assert_allclose(jax.grad(nll)(raw), np.zeros(3), atol=1e-5)
    assert nll(raw) < min(nll(raw + 0.1), nll(raw - 0.1))
    with pytest.raises(ValueError, match=r"raw_variance \(2,\).*teacher \(400, 3\)"):
        nll(jnp.zeros(2))
