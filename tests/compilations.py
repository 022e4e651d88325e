"""How often JAX compiles a function: what it tells of it, since its own caches forget."""

import contextlib
from collections.abc import Iterator

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def count_compilations(name: str) -> Iterator[list[str]]:
    """Gives a list that has an entry for each program of the jitted function of that name."""
    compiled: list[str] = []

    def listen(event: str, _: float, *, fun_name: str = "", **__: object) -> None:
        if event == COMPILED and fun_name == f"jit({name})":
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
