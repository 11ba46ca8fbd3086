"""Schedules of the learning rate, and what a score that stands still leads to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from pyro_flows.infer.density.settings import CUT, CUTS, FINAL, LEAST

__all__ = ["Schedule"]


@dataclass
class Schedule:
    """The learning rate's factor, and what to do when the score stands still.

    - ``"plateau"``: constant; after ``patience`` epochs without improvement back to the best state, with the rate times
      0.3; the end after the second such cut that brings no improvement.
    - ``"cosine"``: from 1 down to 0.01 over the whole run; the end after ``patience`` epochs without improvement.
    - ``"constant"``: likewise, with a constant rate.

    Attributes:
        kind: ``"plateau"``, ``"cosine"`` or ``"constant"``.
        patience: in epochs.
        notable: gain of the score that counts as an improvement.
        scale: factor that cuts have left.
        since: epochs since the last notable improvement or cut.
        idle: cuts since the last notable improvement.
        reference: score at the last notable improvement.
    """

    kind: str
    patience: int
    notable: float = 1e-3
    scale: float = 1.0
    since: int = 0
    idle: int = 0
    reference: float = -math.inf

    def factor(self, progress: float) -> float:
        """The learning rate in units of the first one, after this share of the run."""
        if self.kind == "cosine":
            return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.scale

    def judge(self, score: float) -> str:
        """What follows from an epoch's score: ``"go"``, ``"back"`` to the best state, or ``"stop"``."""
        # Small gains add up: what counts is the gain since the last one that counted.
        if score > self.reference + self.notable:
            self.reference, self.since, self.idle = score, 0, 0
            return "go"
        self.since += 1
        if self.since < self.patience:
            return "go"
        if self.kind != "plateau" or self.idle >= CUTS or self.scale * CUT < LEAST:
            return "stop"
        self.scale, self.idle, self.since = self.scale * CUT, self.idle + 1, 0
        return "back"

    def state_dict(self) -> dict[str, float | int | str]:
        """All of it, as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float | int | str]) -> None:
        """What :meth:`state_dict` gave.

        Raises:
            ValueError: for other names or types.
        """
        expected = {name: type(value) for name, value in asdict(self).items()}
        if {name: type(value) for name, value in state.items()} != expected:
            raise ValueError(f"a schedule of {sorted(state)} with other names or types than {sorted(expected)}")
        for name, value in state.items():
            setattr(self, name, value)
