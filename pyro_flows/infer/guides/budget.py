"""How long a fit may go on: by steps, by wall time, or until it has converged."""

from __future__ import annotations

import math
import time

__all__ = ["Budget", "cosine"]

DEFAULT_STEPS = 4000


class Budget:
    """Progress through a fit, between 0 and 1, and when it is over.

    Args:
        steps: of the optimiser, or ``None``.
        seconds: of wall time since ``start``, or ``None``; whichever comes first.
        start: ``time.monotonic()`` when the clock began.
        keep: seconds at the end that are not for training.
    """

    def __init__(self, steps: int | None, seconds: float | None, start: float, keep: float = 0.0) -> None:
        if steps is None and seconds is None:
            steps = DEFAULT_STEPS
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"fit_guide: expected steps to be a positive integer, got {steps!r}")
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"fit_guide: expected seconds to be a positive number, got {seconds!r}")
        self.steps, self.seconds, self.start, self.keep = steps, seconds, start, keep
        self.done = 0
        self.step_seconds = 0.0  # of the next step, as far as known
        self._training_from = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Wall time since the clock began."""
        return time.monotonic() - self.start

    def left(self) -> float:
        """Seconds until the very end; infinite if only steps are counted."""
        return math.inf if self.seconds is None else self.seconds - self.elapsed

    def begin(self) -> None:
        """Marks where training begins, from which progress by time is counted."""
        self._training_from = time.monotonic()

    @property
    def trained(self) -> float:
        """Seconds since training began."""
        return time.monotonic() - self._training_from

    def resume(self, done: int, spent: float, trained: float) -> None:
        """Goes on after so many steps, and so many seconds, of which so many were training."""
        now = time.monotonic()
        self.done, self.start, self._training_from = done, now - spent, now - trained

    @property
    def fraction(self) -> float:
        """Of the training that is done; 1 or more when it is over, or the next step would end far too late."""
        by_steps = 0.0 if self.steps is None else self.done / self.steps
        if self.seconds is None:
            return by_steps
        now, end = time.monotonic(), self.start + self.seconds - self.keep
        if now + 0.5 * self.step_seconds > end:
            return max(by_steps, 1.0)
        whole = max(end - self._training_from, 1e-3)
        return max(by_steps, (now - self._training_from) / whole)


def cosine(fraction: float, first: float, last: float) -> float:
    """From ``first`` at 0 to ``last`` at 1 along half a cosine."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
