"""Padding in the losses on tokens; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_oracles import CASES, attention_relation, close, hidden_states, numerical_gradient

from kdq.distill import features

TOKENS = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]], np.float32)
ORACLES = {"attention_relation": attention_relation, "hidden_states": hidden_states}


@pytest.mark.parametrize("name", ORACLES)
def test_padding_is_neither_seen_nor_counted(name):
    case, oracle = CASES[name], ORACLES[name]
    arrays, weights = case.arrays(), np.array([1.0, -2.0, 0.5, 3.0, 1.5])
    doubles = [x.astype(np.float64) for x in arrays]
    for x in arrays:
        padding = TOKENS == 0 if x.ndim == 3 else np.repeat(TOKENS[:, None] == 0, 2, axis=1)
        x[padding] = np.nan

    @jax.jit
    def run(*arrays):
        def total(*arrays):
            values = case.loss(*arrays, token_mask=jnp.asarray(TOKENS))
            return jnp.sum(weights * values), values

        return jax.grad(total, tuple(range(len(arrays))), has_aux=True)(*arrays)

    gradients, values = run(*arrays)
    expected = oracle(*doubles, TOKENS)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)
    assert values[3] == 0  # all of it is padding
    for index in case.students:

        def total(x, index=index):
            return weights @ oracle(*doubles[:index], x, *doubles[index + 1 :], TOKENS)

        close(gradients[index], numerical_gradient(total, doubles[index]))
    assert not any(np.any(gradients[i]) for i in case.teachers)


def test_relation_of_values_by_hand():
    # The teacher's second token has all of both rows' attention; the student attends evenly.
    teacher = jnp.array([[0.0], [40.0]])[None, None] * jnp.array([[[[1.0]]]])
    query = jnp.ones_like(teacher)
    student = jnp.zeros((1, 1, 2, 3))
    value = features.attention_relation(student, student, query, teacher)
    np.testing.assert_allclose(value, [np.log(2)], rtol=1e-6)
    # Two equal relations are no loss, whatever makes them: √width cancels the repetition.
    repeated = jnp.repeat(teacher, 4, axis=-1) / 2**0.5
    value = features.attention_relation(repeated, repeated, teacher, teacher)
    np.testing.assert_allclose(value, [0], atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    x, narrow = jnp.zeros((2, 4, 3, 8)), jnp.zeros((2, 4, 3, 6))
    with pytest.raises(ValueError, match=r"student_query \(2, 4, 3, 8\) and student_key"):
        features.attention_relation(x, narrow, x, x)
    with pytest.raises(ValueError, match=r"teacher_query .* and teacher_key \(2, 4, 3, 6\)"):
        features.attention_relation(x, x, x, narrow)
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 8\) and teacher_query \(2, 2, 3, 6\)"):
        features.attention_relation(x, x, narrow[:, :2], narrow[:, :2])
    with pytest.raises(ValueError, match=r"must be \[batch, heads, tokens, width\]"):
        features.attention_relation(x[0], x[0], x[0], x[0])
    with pytest.raises(ValueError, match=r"token_mask \(2, 4\) must have the shape \(2, 3\)"):
        features.attention_relation(x, x, x, x, token_mask=jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 8\) must be \[batch, tokens, width\]"):
        features.hidden_states(x, x)
    with pytest.raises(ValueError, match=r"token_mask \(4, 3\) must have the shape \(2, 4\)"):
        features.hidden_states(x[..., 0], x[..., 0], token_mask=jnp.ones((4, 3)))
