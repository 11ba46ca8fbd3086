"""Work that Ctrl-C must not split, and the state that an interruption leaves."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

__all__ = ["SoFar", "carrying", "interrupts_held_back", "own_handler", "pyro_as_it_was"]

SoFar = list[Callable[[], object]]
"""At most one function, which gives the result so far."""


def own_handler() -> Callable[[int, FrameType | None], Any] | None:
    """The handler of Ctrl-C, if it can be replaced here: in the main thread, and set from Python."""
    handler = signal.getsignal(signal.SIGINT)
    return handler if threading.current_thread() is threading.main_thread() and callable(handler) else None


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Holds Ctrl-C (SIGINT) back inside, and raises ``KeyboardInterrupt`` at the end.

    While one interruption is handled, others are dropped, so that it keeps all it carries.
    """
    handler = own_handler()
    if handler is None:
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
def carrying(so_far: SoFar) -> Iterator[None]:
    """Gives errors raised inside an attribute ``fit``: the result of the first function, or ``None``."""
    try:
        yield
    except BaseException as error:
        vars(error)["fit"] = so_far[0]() if so_far else None
        raise


@contextmanager
def pyro_as_it_was() -> Iterator[None]:
    """Restores Pyro's stacks, on which an interruption at the edge of a handler leaves entries."""
    stacks: list[tuple[list[Any], list[Any]]] = [(s, list(s)) for s in (_PYRO_STACK, _DIM_ALLOCATOR._stack)]
    try:
        yield
    except BaseException:
        with interrupts_held_back():
            for stack, before in stacks:
                stack[:] = before
        raise
