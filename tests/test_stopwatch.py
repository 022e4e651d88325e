"""The stopwatch: what compiles is told apart from what works, once, and in its own thread."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdq.stopwatch import Stopwatch

TOLERANCE = 0.15  # s: of compiling a tiny program, on a busy machine more


def slow_to_trace(seconds, inner=lambda x: x):
    """A program whose compilation takes at least so long: Python sleeps while it is traced."""

    @jax.jit
    def program(x):
        time.sleep(seconds)
        return inner(x) + 1

    return program


def test_tracing_counts_as_compiling_and_the_rest_as_work():
    program, x = slow_to_trace(0.4), jnp.zeros(3)
    watch, start = Stopwatch(), time.monotonic()
    program(x)
    time.sleep(0.3)
    program(x)  # compiled already
    compiling, working, whole = watch.compiling, watch.working, time.monotonic() - start
    assert compiling >= 0.4
    assert 0.3 <= working < 0.3 + TOLERANCE
    np.testing.assert_allclose(compiling + working, whole, atol=0.01)


def test_a_program_that_is_compiled_while_another_is_traced_counts_once():
    inner = slow_to_trace(0.3)

    def eager(x):
        inner(np.zeros(2, np.float32))  # of numbers, not of what is traced: compiled there and then
        return inner(x)  # traced again, for another shape

    program, x = slow_to_trace(0.2, eager), jnp.zeros(3)
    watch, start = Stopwatch(), time.monotonic()
    program(x)
    whole = time.monotonic() - start
    assert 0.8 <= watch.compiling <= whole
    assert watch.working < TOLERANCE


def test_only_its_own_thread_counts():
    program, x = slow_to_trace(0.3), jnp.zeros(3)
    watch = Stopwatch()
    thread = threading.Thread(target=program, args=(x,))
    thread.start()
    thread.join()
    assert watch.compiling == 0
    assert watch.working >= 0.3


def test_a_later_watch_does_not_have_what_was_before():
    slow_to_trace(0.2)(jnp.zeros(3))
    watch = Stopwatch()
    assert watch.compiling == 0
    assert watch.working == pytest.approx(0, abs=0.05)
