"""Schedules of the learning rate, and what a score that stands still leads to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CUT", "CUTS", "FINAL", "HELD_OUT_AT_MOST", "LEAST", "SCHEDULES", "Plan", "Schedule", "Settings"]

SCHEDULES = ("plateau", "cosine", "constant")

# Sizes by the amount of data.
SMALLEST_BATCH, LARGEST_BATCH, BATCHES = 64, 1024, 32  # a batch is about one of so many parts of the data


TOTAL_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 20_000, 20, 1000


PATIENCE_STEPS, SHORTEST_PATIENCE = 600, 5


HELD_OUT_AT_MOST = 20_000  # rows of a random validation part


# The plateau schedule: factor of a cut; cuts in vain before the end; the factor that is too small to go on with.
CUT, CUTS, LEAST = 0.3, 2, 1e-3


FINAL = 0.01  # where the cosine ends, as a factor of the first rate


@dataclass(frozen=True)
class Plan:
    """Sizes of a fit.

    Attributes:
        batch_size: rows in a step.
        max_epochs: passes over the data at most.
        patience: epochs without improvement before something is done about it.
        total_steps: steps in the longest run that the limits allow.
    """

    batch_size: int
    max_epochs: int
    patience: int
    total_steps: int


@dataclass(frozen=True)
class Settings:
    """What the caller chose; the fields are keywords of :func:`~pyro_flows.infer.density.fit.fit_density`.

    Raises:
        ValueError: for a number out of range.
    """

    validation_fraction: float
    standardize: bool | None
    batch_size: int | None
    max_epochs: int | None
    max_steps: int | None
    seconds: float | None
    lr: float
    schedule: str
    patience: int | None
    weight_decay: float
    clip_norm: float | None
    average: float
    checkpoint_every: int
    seed: int
    objective: str = "likelihood"

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_epochs", "max_steps", "patience", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"fit_density: expected {name} to be an integer >= 1, got {value!r}")
        for name in ("seconds", "lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and not math.isnan(value)):
                raise ValueError(f"fit_density: expected {name} > 0, got {value!r}")
        for name in ("validation_fraction", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"fit_density: expected 0 <= {name} < 1, got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"fit_density: expected weight_decay >= 0, got {self.weight_decay!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"fit_density: expected schedule to be one of {SCHEDULES}, got {self.schedule!r}")

    def batch_size_for(self, rows: int) -> int:
        """The batch size: as chosen, or a power of two near a thirty-second of the rows."""
        if self.batch_size is not None:
            if self.batch_size > rows:
                raise ValueError(
                    f"fit_density: batch_size={self.batch_size} is more than the {rows} rows to train on; "
                    "choose a smaller one or leave it out"
                )
            return self.batch_size
        near = 2 ** round(math.log2(max(rows / BATCHES, 1.0)))
        return min(max(near, SMALLEST_BATCH), LARGEST_BATCH, rows)

    def plan(self, batch_size: int, steps_per_epoch: int) -> Plan:
        """Sizes, by the steps of an epoch where they were not chosen."""
        epochs, patience = self.max_epochs, self.patience
        if epochs is None and self.max_steps is not None:
            epochs = -(-self.max_steps // steps_per_epoch)
        elif epochs is None:
            epochs = min(max(-(-TOTAL_STEPS // steps_per_epoch), FEWEST_EPOCHS), MOST_EPOCHS)
        if patience is None:
            patience = max(SHORTEST_PATIENCE, -(-PATIENCE_STEPS // steps_per_epoch))
        total = epochs * steps_per_epoch
        return Plan(batch_size, epochs, patience, total if self.max_steps is None else min(total, self.max_steps))

    def identity(self, plan: Plan, optimizer: str) -> dict[str, Any]:
        """What a resumed fit must agree on: all but limits, of which the cosine is a function."""
        chosen = {**asdict(self), "batch_size": plan.batch_size, "patience": plan.patience, "optimizer": optimizer}
        limits = {name: chosen.pop(name) for name in ("max_epochs", "max_steps", "seconds")}
        del chosen["checkpoint_every"]
        return {**chosen, **limits, "max_epochs": plan.max_epochs} if self.schedule == "cosine" else chosen


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
