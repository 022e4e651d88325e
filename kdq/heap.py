"""The C heap that arrays on a CPU live in."""

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, instead of handing it back to the system each time.

    XLA allocates the intermediates of a step on a CPU in one piece and frees them after it. That
    is more than glibc keeps, so each step would get pages that the system has to fill with zeros
    at first touch: a quarter of the time of a small transformer's step (`benchmarks/results/`). The
    price is that the process holds the most that it ever held.

    To be called before JAX computes anything: its threads must not have heaps of their own yet,
    for those are too small for such a piece. What a user has set by MALLOC_* or GLIBC_TUNABLES for
    the same is overruled. Arrays on other devices are not concerned.

    Returns:
      Whether the C library could be told: glibc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    settings = {_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0, _M_ARENA_MAX: 1}
    accepted = [mallopt(name, value) for name, value in settings.items()]
    return all(accepted)
