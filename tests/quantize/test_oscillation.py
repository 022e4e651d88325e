"""Oscillations against a count by hand, one weight at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.quantize import grid, oscillation

QPARAMS = {"layer": {"weights": grid.from_range(jnp.float32(-1), jnp.float32(0.75), 3)}}
SCALE = float(QPARAMS["layer"]["weights"].scale)


def _params(codes):
    return {"layer": {"kernel": jnp.asarray(SCALE * np.asarray(codes), jnp.float32)}}


def _by_hand(sequence, threshold, momentum=oscillation.MOMENTUM):
    """Algorithm 1 of the paper for one weight: `(frequencies, codes)` after each step."""
    past, direction, frequency, average, frozen = sequence[0], 0, 0.0, float(sequence[0]), None
    found = []
    for code in sequence[1:]:
        code = past if frozen is not None else code
        change = int(np.sign(code - past))
        oscillated = change != 0 and change == -direction
        frequency = momentum * oscillated + (1 - momentum) * frequency
        average = momentum * code + (1 - momentum) * average
        if change:
            direction = change
        if frozen is None and frequency > threshold:
            frozen = code = int(np.round(average))
        past = code
        found.append((frequency, code))
    return found


@pytest.mark.parametrize("threshold", [1.0, 0.06])
def test_frequencies_and_freezing_by_hand(threshold):
    rng = np.random.default_rng(0)
    to_and_fro = np.tile([1, 2], 20)
    sequences = np.stack(
        [to_and_fro, np.arange(40) % 3 - 1, np.full(40, 2), np.sort(rng.integers(-3, 3, 40))], 1
    )
    state = oscillation.init(_params(sequences[0] + 0.2), QPARAMS)
    update = jax.jit(oscillation.update)
    for i, codes in enumerate(sequences[1:]):
        params = _params(codes + rng.uniform(-0.4, 0.4, 4))
        state, after = update(state, params, QPARAMS, threshold)
        expected = [_by_hand(s[: i + 2], threshold)[-1] for s in sequences.T]
        one = state["layer"]
        np.testing.assert_allclose(one.frequency, [f for f, _ in expected], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(one.codes, [c for _, c in expected])
        rest = np.asarray(one.frozen)
        kernel = np.asarray(after["layer"]["kernel"])
        np.testing.assert_allclose(kernel[rest], SCALE * np.asarray(one.codes)[rest], rtol=1e-6)
        np.testing.assert_array_equal(kernel[~rest], np.asarray(params["layer"]["kernel"])[~rest])
    assert list(rest) == ([True, True, False, False] if threshold < 1 else [False] * 4)
    share = oscillation.share(state)
    assert share["oscillating"] == 0.5
    assert share["frozen"] == (0.5 if threshold < 1 else 0)


def test_dampening_pulls_to_the_nearest_code_and_not_beyond_the_grid():
    codes = np.array([0.3, -1.4, 2.0, 5.0, -9.0])  # the last two are clipped
    value, slope = jax.value_and_grad(oscillation.dampening)(_params(codes), QPARAMS)
    error = np.array([0.3, 0.4, 0, 0, 0]) * SCALE
    assert float(value) == pytest.approx((error**2).sum(), rel=1e-5)
    expected = 2 * SCALE * np.array([0.3, -0.4, 0, 0, 0])
    np.testing.assert_allclose(slope["layer"]["kernel"], expected, atol=1e-6)


def test_a_stack_of_layers_counts_each_of_its_own():
    low, high = jnp.array([[-1.0], [-2.0]]), jnp.array([[0.5], [0.5]])
    quantizer = grid.from_range(low, high, 3)
    stacked = quantizer.replace(qmin=jnp.full(2, quantizer.qmin), qmax=jnp.full(2, quantizer.qmax))
    qparams = {"layer": {"weights": stacked}}
    params = {"layer": {"kernel": jnp.array([[0.3], [0.3]])}}
    state = oscillation.init(params, qparams)
    codes = np.asarray(state["layer"].codes)
    np.testing.assert_array_equal(codes, np.round(0.3 / np.asarray(quantizer.scale)))
    assert codes[0] != codes[1]
