"""Ctrl-C at moments when it would leave threads of other libraries half way."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def held_back(presses: int | None = None) -> Iterator[None]:
    """Holds Ctrl-C back to the end of the block, where it does what it does otherwise.

    Args:
      presses: so many are heard at once all the same, of whoever will not wait; None: none is.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    count = 0

    def note(number: int, frame: Any) -> None:
        nonlocal count
        count += 1
        if presses is not None and count >= presses:
            handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if count:
        handler(signal.SIGINT, None)
