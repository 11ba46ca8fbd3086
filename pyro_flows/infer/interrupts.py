"""What has to be done in one piece although somebody presses Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interrupts_held_back"]


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Inside, Ctrl-C (SIGINT) has to wait; one that came raises ``KeyboardInterrupt`` at the end.

    If an interruption is already being handled, further ones are dropped, so that the first one gets through with all
    that it carries.
    """
    handler = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread only; None is a handler that was not set from Python.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    handled = isinstance(sys.exc_info()[1], KeyboardInterrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came and not handled:
            handler(signal.SIGINT, None)
