"""Ctrl-C: once to end in good order, twice to end at once; not in the middle of a save."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

STATUS = 130  # of a program that Ctrl-C ended


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


def end_at_second(message: str) -> None:
    """Makes a second Ctrl-C end the program at once, with a message.

    What cleans up after the first would be cut short anywhere, and could then wait for ever; as
    after a kill, the next run goes on from what is there.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # it is ignored, or somebody else's
    count = 0

    def note(number: int, frame: Any) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise KeyboardInterrupt
        print(message, file=sys.stderr, flush=True)
        os._exit(STATUS)

    signal.signal(signal.SIGINT, note)
