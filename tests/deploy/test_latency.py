"""Timing: what takes longer is said to, under the conditions that are said."""

import os
import time

import numpy as np
import pytest

from kdq.deploy.measure import latency


def sleeps(seconds):
    return lambda *_: time.sleep(seconds)


def test_ratios_are_to_the_base():
    calls = {"base": sleeps(0.02), "slower": sleeps(0.08), "faster": sleeps(0.005)}
    timed = latency.take_turns(calls, "base", rounds=5, warmup=1)
    assert timed["base"].ratio == 1
    assert timed["base"].quartiles == (1, 1)
    assert timed["slower"].ratio < 0.5
    assert timed["faster"].ratio > 2
    assert timed["slower"].milliseconds >= 80


def test_short_calls_are_repeated_within_a_turn():
    count = [0]

    def call():
        count[0] += 1

    latency.take_turns({"base": call}, "base", rounds=3, warmup=1, least_seconds=1e-3)
    assert count[0] > 100


def test_runtimes_get_batches_of_the_sizes_in_their_order():
    seen = []
    runtimes = {"base": lambda batch: seen.append(batch.copy())}
    images = np.arange(3, dtype=np.float32).reshape(3, 1)
    settings = {"rounds": 1, "warmup": 0, "least_seconds": 0}
    timed = latency.measure(runtimes, images, base="base", batches=(2, 5), **settings)
    assert set(timed["base"]) == {2, 5}
    assert {tuple(batch.ravel()) for batch in seen} == {(0, 1), (0, 1, 2, 0, 1)}


def test_threads_are_kept_to_cores_and_let_go_after_an_error():
    before = os.sched_getaffinity(0)
    (core,) = latency.cores(1)
    seen = []

    def fail():
        with latency.pinned([core]):
            seen.append(os.sched_getaffinity(0))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [{core}]
    assert os.sched_getaffinity(0) == before
    assert latency.cores(None) == sorted(before)
    for threads in (0, len(before) + 1):
        with pytest.raises(ValueError, match=f"threads={threads}: this process has"):
            latency.cores(threads)
