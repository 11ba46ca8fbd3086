"""What has to be done in one piece although somebody presses Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

__all__ = ["carrying", "interrupts_held_back", "pyro_as_it_was"]


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


@contextmanager
def carrying(so_far: list[Callable[[], object]]) -> Iterator[None]:
    """What is raised inside carries as its attribute ``fit`` what the first of these gives, or ``None``."""
    try:
        yield
    except BaseException as error:
        error.fit = so_far[0]() if so_far else None
        raise


@contextmanager
def pyro_as_it_was() -> Iterator[None]:
    """Takes off Pyro's stacks what an interruption has left on them, on the way in or out of a handler."""
    stacks = [(stack, list(stack)) for stack in (_PYRO_STACK, _DIM_ALLOCATOR._stack)]
    try:
        yield
    except BaseException:
        with interrupts_held_back():
            for stack, before in stacks:
                stack[:] = before
        raise
