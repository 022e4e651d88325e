"""The heap: what a step frees is there for the next."""

import platform
import subprocess
import sys

import pytest

from kdq import heap

# 144 MB of intermediates a call, in a process of its own: the setting is for good.
FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from kdq import heap
if sys.argv[1] == "kept":
    assert heap.keep_freed_memory()
f = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x)
x = jnp.ones((6000, 8))
for _ in range(10):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(which: str) -> int:
    run = [sys.executable, "-c", FAULTS, which]
    return int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_intermediates_are_not_paged_in_again_each_step():
    assert page_faults("kept") < page_faults("freed") / 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert not heap.keep_freed_memory()
