"""Schedules against their closed forms, and what they refuse."""

import math

import jax
import numpy as np
import pytest

from kdq.distill import schedule
from kdq.fields import ConfigError

CASES = [
    (0.7, lambda t: 0.7),
    ({"kind": "constant", "value": 2}, lambda t: 2.0),
    ({"kind": "linear", "start": 1.0, "end": 3.0}, lambda t: 1 + 2 * t),
    (
        {"kind": "linear", "start": 1.0, "end": 0.0, "since": 0.2, "until": 0.6},
        lambda t: 1 - min(max((t - 0.2) / 0.4, 0), 1),
    ),
    (
        {"kind": "cosine", "start": 2.0, "end": 1.0, "until": 0.5},
        lambda t: 1.5 + 0.5 * math.cos(math.pi * min(t / 0.5, 1)),
    ),
    ({"kind": "warmup", "value": 4.0, "until": 0.25}, lambda t: 4 * min(t / 0.25, 1)),
    (
        {"kind": "phases", "values": (1.0, 0.0, 5.0), "starts": (0.0, 0.25, 0.75)},
        lambda t: 1.0 if t < 0.25 else 0.0 if t < 0.75 else 5.0,
    ),
]


@pytest.mark.parametrize(("config", "expected"), CASES)
def test_values(config, expected):
    built = schedule.build(config, "weight")
    for t in (0.0, 0.1, 0.2, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0):
        np.testing.assert_allclose(built(np.float32(t)), expected(t), rtol=1e-5, atol=1e-6)


def test_a_schedule_may_be_a_constant_of_a_jitted_function():
    built = schedule.build({"kind": "phases", "values": (1.0, 2.0), "starts": (0.0, 0.5)}, "w")
    assert float(jax.jit(lambda t: built(t))(0.7)) == 2.0


def test_numbers_are_data():
    call = jax.jit(lambda s, t: s(t))
    values = [
        float(call(schedule.build({"kind": "linear", "start": a, "end": b}, ""), 0.5))
        for a, b in ((0, 1), (2, 4))
    ]
    assert values == [0.5, 3.0]
    assert call._cache_size() == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kind": "linaer", "start": 0, "end": 1}, ["w.kind", "'linear'?", "constant, linear"]),
        ({"start": 0, "end": 1}, ["w.kind", "None"]),
        ({"kind": "linear", "start": 0}, ["w.end is missing"]),
        ({"kind": "linear", "start": 0, "end": 1, "untl": 1}, ["w", "'until'?"]),
        ({"kind": "linear", "start": 0, "end": 1, "since": 0.5, "until": 0.5}, ["must rise"]),
        ({"kind": "warmup", "value": 1, "until": 1.5}, ["rise from 0 to 1"]),
        ({"kind": "phases", "values": (1, 2), "starts": (0.1, 0.5)}, ["must begin with 0"]),
        ({"kind": "phases", "values": (1, 2), "starts": (0,)}, ["2 values for 1 starts"]),
        (float("nan"), ["finite"]),
        ("high", ["w"]),
    ],
)
def test_what_makes_no_sense_is_refused(config, words):
    with pytest.raises(ConfigError) as error:
        schedule.build(config, "w")
    for word in words:
        assert word in str(error.value)
