"""The chunked loss against a float64 loop over tokens, and the memory and work it saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from kdq.distill import losses
from kdq.distill.chunked import chunked_kl

TOKENS, VOCABULARY = 13, 11
CHUNKS = [None, 1, 4, 50]  # 4 does not divide the tokens
TEMPERATURES = [0.5, 1.0, 4.0, 20.0]
NAMES = ("student_hidden", "student_head", "student_bias")
ALL = np.ones(TOKENS)
MASK = np.array([1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0], np.int32)


def _arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {
        "student_hidden": (TOKENS, 6),
        "student_head": (6, VOCABULARY),
        "teacher_hidden": (TOKENS, 5),
        "teacher_head": (5, VOCABULARY),
        "student_bias": (VOCABULARY,),
        "teacher_bias": (VOCABULARY,),
    }
    return {k: jnp.asarray(rng.normal(size=shape), dtype) for k, shape in shapes.items()}


def _oracle(arrays, temperature, weights):
    """The losses, and the gradients of Σ weights · losses: T (q − p) to the logits of a token."""
    a = {k: np.asarray(v, np.float64) for k, v in arrays.items()}
    student_bias, teacher_bias = a.get("student_bias", 0.0), a.get("teacher_bias", 0.0)
    values = np.zeros(len(weights))
    gradients = {k: np.zeros(a[k].shape) for k in NAMES if k in a}
    for i, weight in enumerate(weights):
        hidden = a["student_hidden"][i]
        log_q = log_softmax((hidden @ a["student_head"] + student_bias) / temperature)
        teacher = a["teacher_hidden"][i] @ a["teacher_head"] + teacher_bias
        log_p = log_softmax(teacher / temperature)
        values[i] = temperature**2 * np.sum(np.exp(log_p) * (log_p - log_q))
        to_logits = weight * temperature * (np.exp(log_q) - np.exp(log_p))
        gradients["student_hidden"][i] = a["student_head"] @ to_logits
        gradients["student_head"] += np.outer(hidden, to_logits)
        if "student_bias" in gradients:
            gradients["student_bias"] += to_logits
    return values, gradients


@functools.partial(jax.jit, static_argnames=("chunk", "reduction"))
@functools.partial(jax.value_and_grad, has_aux=True)
def _graded(arrays, weights, temperature, mask=None, *, chunk=4, reduction="none"):
    """Σ weights · losses with its gradients, and the losses as they come."""
    value = chunked_kl(
        **arrays, temperature=temperature, mask=mask, chunk=chunk, reduction=reduction
    )
    return jnp.sum(weights * value), value


def _shares(reduction, counts=ALL):
    """What a token's loss weighs in the reduced loss, times 3 so that no cotangent is 1."""
    return 3 * counts / (counts.sum() if reduction == "mean" else 1)


def _check_gradients(arrays, found, expected):
    for name, gradient in expected.items():
        size = np.abs(gradient).max()
        assert size > 0.01
        np.testing.assert_allclose(found[name], gradient, atol=1e-5 * max(1.0, size), err_msg=name)
    for name in set(arrays) - set(expected):  # the teacher's
        np.testing.assert_array_equal(found[name], np.zeros(arrays[name].shape), err_msg=name)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_values_and_gradients_of_tokens_with_weights_of_their_own(chunk):
    arrays, weights = _arrays(), np.linspace(-1, 2, TOKENS)
    for temperature in TEMPERATURES:
        values, gradients = _oracle(arrays, temperature, weights)
        (_, value), found = _graded(arrays, weights, temperature, chunk=chunk)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, values, rtol=1e-5)
        _check_gradients(arrays, found, gradients)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reduced_values_and_gradients(chunk, reduction):
    arrays, weights = _arrays(), _shares(reduction)
    for temperature in TEMPERATURES:
        values, gradients = _oracle(arrays, temperature, weights)
        (total, value), found = _graded(arrays, 3.0, temperature, chunk=chunk, reduction=reduction)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(total, np.sum(weights * values), rtol=1e-5)
        _check_gradients(arrays, found, gradients)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_without_a_gradient_the_values_are_the_same(reduction):
    values, _ = _oracle(_arrays(), 1.0, ALL)
    expected = {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]
    value = chunked_kl(**_arrays(), chunk=4, reduction=reduction)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_no_reduction_and_temperature_1_unless_given():
    values, _ = _oracle(_arrays(), 1.0, ALL)
    np.testing.assert_allclose(chunked_kl(**_arrays()), values, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("biased", [{"student_bias"}, {"teacher_bias"}, set()])
def test_each_bias_is_optional(biased, reduction):
    arrays = {k: v for k, v in _arrays().items() if not k.endswith("bias") or k in biased}
    values, gradients = _oracle(arrays, 2.0, _shares(reduction))
    (total, _), found = _graded(arrays, 3.0, 2.0, reduction=reduction)
    np.testing.assert_allclose(total, 3 * values.sum(), rtol=1e-5)
    _check_gradients(arrays, found, gradients)


@pytest.mark.parametrize(
    ("reduction", "dtype"), [("none", bool), ("sum", np.float32), ("mean", np.int32)]
)
def test_masked_tokens_have_no_value_and_no_gradient(reduction, dtype):
    arrays, mask, weights = _arrays(), jnp.asarray(MASK, dtype), _shares(reduction, MASK)
    values, gradients = _oracle(arrays, 2.0, weights)
    (total, value), found = clean = _graded(arrays, 3.0, 2.0, mask, reduction=reduction)
    np.testing.assert_allclose(total, np.sum(weights * values), rtol=1e-5)
    _check_gradients(arrays, found, gradients)
    np.testing.assert_array_equal(found["student_hidden"][MASK == 0], 0)
    if reduction == "none":
        np.testing.assert_allclose(value, MASK * values, rtol=1e-5)

    spoilt = dict(arrays)
    for name, bad in (("student_hidden", np.nan), ("teacher_hidden", np.inf)):
        spoilt[name] = jnp.where(MASK[:, None] == 0, bad, arrays[name])
    dirty = _graded(spoilt, 3.0, 2.0, mask, reduction=reduction)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_nothing_but_padding_counts_0():
    mask = jnp.zeros(TOKENS, jnp.int32)
    (_, value), gradients = _graded(_arrays(), 3.0, 2.0, mask, reduction="mean")
    assert value == 0
    jax.tree.map(lambda v: np.testing.assert_array_equal(v, np.zeros(v.shape)), gradients)
    nothing = {k: v[:0] if k.endswith("hidden") else v for k, v in _arrays().items()}
    assert chunked_kl(**nothing, reduction="mean") == 0
    assert chunked_kl(**nothing).shape == (0,)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_bfloat16_is_accumulated_in_float32(reduction):
    arrays = _arrays(dtype=jnp.bfloat16)
    (_, value), found = _graded(arrays, 1.0, 2.0, reduction=reduction)
    values, gradients = _oracle(arrays, 2.0, ALL)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, values if reduction == "none" else values.sum(), rtol=2e-5)
    for name, expected in gradients.items():
        assert found[name].dtype == jnp.bfloat16
        size = np.abs(expected).max()
        np.testing.assert_allclose(
            np.asarray(found[name], np.float64), expected, rtol=0.01, atol=0.005 * size
        )


def test_a_float32_head_of_bfloat16_hidden_states_gets_a_float32_gradient():
    arrays = _arrays()
    for name in ("student_hidden", "teacher_hidden"):
        arrays[name] = arrays[name].astype(jnp.bfloat16)
    _, found = _graded(arrays, 1.0, 1.0, reduction="sum")
    _, gradients = _oracle(arrays, 1.0, ALL)
    assert found["student_hidden"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found["student_head"], gradients["student_head"], atol=1e-4)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_extreme_logits_are_exact_and_their_gradients_finite(reduction):
    eye = jnp.eye(3)
    student = jnp.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    teacher = jnp.array([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [1e4, 1e4, 1e4]])

    arrays = {
        "student_hidden": student,
        "student_head": eye,
        "teacher_hidden": teacher,
        "teacher_head": eye,
    }
    for temperature in TEMPERATURES:
        (value, _), found = _graded(arrays, 1.0, temperature, reduction=reduction)
        # The teacher is certain of class 1, to which the student gives log-probability -2e4 / T.
        np.testing.assert_allclose(value, 2e4 * temperature, rtol=1e-6)
        certain = temperature * np.array([[1, -1, 0], [0, 0, 0], [0, 0, 0]])
        np.testing.assert_allclose(found["student_hidden"], certain, atol=1e-6)
        np.testing.assert_allclose(found["student_head"], student.T @ certain, atol=1e-2)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_leading_axes_are_kept(reduction):
    arrays, mask, weights = _arrays(), MASK[:12], _shares(reduction, MASK[:12])
    for name in ("student_hidden", "teacher_hidden"):
        arrays[name] = arrays[name][:12]
    values, gradients = _oracle(arrays, 2.0, weights)
    shape = (2, 3, 2)
    shaped = {k: v.reshape(*shape, -1) if k.endswith("hidden") else v for k, v in arrays.items()}
    mask = jnp.asarray(mask.reshape(shape))
    (total, value), found = _graded(shaped, 3.0, 2.0, mask, reduction=reduction)
    np.testing.assert_allclose(total, np.sum(weights * values), rtol=1e-5)
    assert value.shape == (shape if reduction == "none" else ())
    if reduction == "none":
        np.testing.assert_allclose(value, (MASK[:12] * values).reshape(shape), rtol=1e-5)
    expected = gradients["student_hidden"].reshape(*shape, -1)
    np.testing.assert_allclose(found["student_hidden"], expected, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_the_temperature_has_no_gradient(reduction):
    loss = lambda t: jnp.sum(chunked_kl(**_arrays(), temperature=t, reduction=reduction))
    assert jax.grad(loss)(2.0) == 0
    assert abs(loss(2.1) - loss(2.0)) > 0.01  # though the value depends on it


def _products(jaxpr):
    """The matrix products that a traced function asks for, also inside its loops and calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)  # a closed one
            if hasattr(inner, "eqns"):
                yield from _products(inner)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_every_product_accumulates_in_float32(reduction):
    # Values can't tell: a compiler may keep more digits than bfloat16 has.
    graded = functools.partial(_graded, reduction=reduction)
    traced = jax.make_jaxpr(graded)(_arrays(dtype=jnp.bfloat16), 1.0, 2.0)
    products = list(_products(traced.jaxpr))
    assert len(products) == (6 if reduction == "none" else 4)
    for product in products:
        assert {v.aval.dtype for v in product.invars} == {jnp.dtype(jnp.bfloat16)}
        assert [v.aval.dtype for v in product.outvars] == [jnp.float32]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_without_a_gradient_only_the_logits_are_computed(reduction):
    # Asked for, not compiled: without jit nothing removes a product that nobody needs.
    loss = functools.partial(chunked_kl, reduction=reduction)
    assert len(list(_products(jax.make_jaxpr(lambda a: loss(**a))(_arrays()).jaxpr))) == 2


def _compiled(loss, shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(loss).lower(*arrays).compile()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_peak_memory_is_less_than_a_quarter_of_the_dense_loss(reduction):
    shapes = [(512, 32), (32, 8192), (512, 32), (32, 8192)]

    def dense(student, student_head, teacher, teacher_head):
        return jnp.sum(losses.kl(student @ student_head, teacher @ teacher_head, 2.0))

    def chunked(*arrays):
        return jnp.sum(chunked_kl(*arrays, 2.0, reduction=reduction))

    peaks = []
    for loss in (dense, chunked):
        found = _compiled(jax.value_and_grad(loss, (0, 1)), shapes).memory_analysis()
        peaks.append(found.temp_size_in_bytes + found.output_size_in_bytes)
    assert peaks[1] * 4 < peaks[0]


def test_the_gradient_of_a_frozen_head_is_not_computed():
    # So deep that products are nearly all of the work; the compiler counts a loop's body once.
    shapes = [(8, 2048), (2048, 64), (8, 2048), (2048, 64)]

    def work(argnums):
        loss = lambda *a: chunked_kl(*a, 2.0, chunk=4, reduction="sum")
        compiled = _compiled(jax.value_and_grad(loss, argnums), shapes)
        return compiled.cost_analysis()["flops"]

    assert work(0) == pytest.approx(3 / 4 * work((0, 1)), rel=0.05)


def _changed(**changes):
    return _arrays() | {
        k: v if isinstance(v, str | int) else jnp.zeros(v) for k, v in changes.items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_changed(student_hidden=(TOKENS, 7)), r"student hidden \(13, 7\), head \(6, 11\)"),
        (_changed(teacher_head=(6, VOCABULARY)), r"teacher hidden \(13, 5\), head \(6, 11\)"),
        (_changed(student_bias=(1,)), r"student .* bias \(1,\)"),
        (_changed(teacher_bias=(VOCABULARY, 1)), r"teacher .* bias \(11, 1\)"),
        (_changed(teacher_hidden=(1, 5)), r"the same tokens"),
        (_changed(teacher_head=(5, 12), teacher_bias=(12,)), r"one vocabulary"),
        (_changed(mask=(TOKENS, 1)), r"mask .* \(13,\), given \(13, 1\)"),
        (_changed(chunk=0), "chunk must be at least 1, given 0"),
        (_changed(reduction="max"), "reduction must be one of .*'none'.* given 'max'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        chunked_kl(**arguments)
