"""The length of a fit and the decay of its step size."""

from __future__ import annotations

import math

from pyro_flows.infer.machine.processes import clock

__all__ = ["Budget", "cosine"]


class Budget:
    """Progress through a fit, between 0 and 1.

    ``steps`` or ``seconds`` since ``start`` end the fit, whichever come first; ``None`` is no limit.  Training leaves
    the last ``keep`` seconds.
    """

    def __init__(self, steps: int | None, seconds: float | None, start: float, keep: float = 0.0) -> None:
        self.steps, self.seconds, self.start, self.keep = steps, seconds, start, keep
        self.done = 0
        self.step_seconds = 0.0  # the expected time of the next step
        self.begin()

    def begin(self) -> None:
        """Marks the beginning of training."""
        self._training_from = clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the clock began."""
        return clock() - self.start

    @property
    def trained(self) -> float:
        """Seconds since training began."""
        return clock() - self._training_from

    def left(self) -> float:
        """Seconds to the end; infinite without a limit."""
        return math.inf if self.seconds is None else self.seconds - self.elapsed

    def resume(self, done: int, spent: float, trained: float) -> None:
        """Continues after ``done`` steps and ``spent`` seconds, ``trained`` of them in training."""
        now = clock()
        self.done, self.start, self._training_from = done, now - spent, now - trained

    @property
    def fraction(self) -> float:
        """The finished part of training; at least 1 if the next step would end far too late."""
        return self.fraction_after(0)

    def fraction_after(self, steps: int) -> float:
        """The part that will be finished after so many more steps."""
        by_steps = 0.0 if self.steps is None else (self.done + steps) / self.steps
        if self.seconds is None:
            return by_steps
        now, end = clock() + steps * self.step_seconds, self.start + self.seconds - self.keep
        if now + 0.5 * self.step_seconds > end:
            return max(by_steps, 1.0)
        whole = max(end - self._training_from, 1e-3)
        return max(by_steps, (now - self._training_from) / whole)


def cosine(fraction: float, first: float, last: float) -> float:
    """Falls from ``first`` at 0 to ``last`` at 1 along half a cosine."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
