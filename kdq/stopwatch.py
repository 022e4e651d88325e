"""Time that work takes, and apart from it the time in which JAX compiled programs for it."""

import threading
import time
from typing import Any

import jax

# What JAX tells of each program: it traces Python, lowers the trace, and compiles that or reads it
# from the cache of compiled programs.
EVENTS = frozenset(
    f"/jax/core/compile/{name}_duration"
    for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)


class Stopwatch:
    """Seconds since it was made, in this thread: of compiling, and of all else.

    Steps that a device still computes while the next program is compiled count as compiling: wait
    for them first.
    """

    def __init__(self):
        self._start, self._compiled = time.monotonic(), _spans().seconds

    @property
    def compiling(self) -> float:
        """Seconds in which programs were traced, lowered, and compiled or read from the cache."""
        return _spans().seconds - self._compiled

    @property
    def working(self) -> float:
        """Seconds of all else."""
        return time.monotonic() - self._start - self.compiling


class _Spans:
    """The union of spans of time that end one after another."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []
        self.seconds = 0.0

    def add(self, start: float, end: float) -> None:
        # An outer span ends after those within it: programs are compiled while another is traced.
        while self._spans and self._spans[-1][0] >= start:
            inner_start, inner_end = self._spans.pop()
            self.seconds -= inner_end - inner_start
        if self._spans:
            start = max(start, self._spans[-1][1])
        self._spans.append((start, end))
        self.seconds += end - start


_of_thread = threading.local()


def _spans() -> _Spans:
    if not hasattr(_of_thread, "spans"):
        _of_thread.spans = _Spans()
    return _of_thread.spans


def _hear(event: str, seconds: float, **_: Any) -> None:
    if event in EVENTS:
        now = time.monotonic()
        _spans().add(now - seconds, now)


jax.monitoring.register_event_duration_secs_listener(_hear)
