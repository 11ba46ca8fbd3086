"""Settings of a fit, their defaults by the amount of data, and the schedule of the learning rate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pyro_flows.core.checks import choice, integer
from pyro_flows.infer.machine.budget import cosine

__all__ = ["CUT", "CUTS", "FINAL", "HELD_OUT_AT_MOST", "LEAST", "SCHEDULES", "Schedule", "Settings", "Sizes"]

SCHEDULES = ("plateau", "cosine", "constant")

# Defaults by the amount of data.
SMALLEST_BATCH, LARGEST_BATCH, BATCHES = 64, 1024, 32  # BATCHES: in an epoch, about
TOTAL_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 20_000, 20, 1000
PATIENCE_STEPS, SHORTEST_PATIENCE = 600, 5
HELD_OUT_AT_MOST = 20_000  # rows of a random validation part

# The plateau schedule: factor of a cut; cuts in vain before the end; the factor that is too small to go on with.
CUT, CUTS, LEAST = 0.3, 2, 1e-3
FINAL = 0.01  # where the cosine ends, as a factor of the first rate


class Sizes(NamedTuple):
    """Sizes of a fit.

    Attributes:
        batch_size: rows in a step.
        max_epochs: passes over the data at most.
        patience: epochs without improvement until something is done about it.
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
    steps: int | None
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
        for name in ("batch_size", "max_epochs", "steps", "patience", "checkpoint_every"):
            if getattr(self, name) is not None:
                integer("fit_density", name, getattr(self, name))
        for name in ("seconds", "lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"fit_density: expected {name} > 0, got {value!r}")
        for name in ("validation_fraction", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"fit_density: expected 0 <= {name} < 1, got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"fit_density: expected weight_decay >= 0, got {self.weight_decay!r}")
        choice("fit_density", "schedule", self.schedule, SCHEDULES)

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

    def sizes(self, batch_size: int, steps_per_epoch: int) -> Sizes:
        """Sizes, by the steps of an epoch where the caller left them open."""
        epochs, patience = self.max_epochs, self.patience
        if epochs is None and self.steps is not None:
            epochs = -(-self.steps // steps_per_epoch)
        elif epochs is None:
            epochs = min(max(-(-TOTAL_STEPS // steps_per_epoch), FEWEST_EPOCHS), MOST_EPOCHS)
        if patience is None:
            patience = max(SHORTEST_PATIENCE, -(-PATIENCE_STEPS // steps_per_epoch))
        total = epochs * steps_per_epoch
        return Sizes(batch_size, epochs, patience, total if self.steps is None else min(total, self.steps))

    def identity(self, sizes: Sizes, optimizer: str) -> dict[str, Any]:
        """What a resumed fit must agree on: all but limits, of which only the cosine is a function."""
        chosen = {**asdict(self), "batch_size": sizes.batch_size, "patience": sizes.patience, "optimizer": optimizer}
        del chosen["checkpoint_every"]
        limits = {name: chosen.pop(name) for name in ("max_epochs", "steps", "seconds")}
        return {**chosen, **limits, "max_epochs": sizes.max_epochs} if self.schedule == "cosine" else chosen


@dataclass
class Schedule:
    """The learning rate's factor, and what follows when the score stands still.

    - ``"plateau"``: constant; after ``patience`` epochs without improvement, training returns to the best state with
      0.3 times the rate; the second such cut without improvement ends it.
    - ``"cosine"``: from 1 down to 0.01 over the whole run; ``patience`` epochs without improvement end it.
    - ``"constant"``: a constant rate; ``patience`` epochs without improvement end the training.

    Attributes:
        kind: ``"plateau"``, ``"cosine"`` or ``"constant"``.
        patience: in epochs.
        notable: the gain of the score that counts as an improvement.
        scale: the factor left by cuts.
        since: epochs since the last notable improvement or cut.
        idle: cuts since the last notable improvement.
        reference: the score at the last notable improvement.
    """

    kind: str
    patience: int
    notable: float = 1e-3
    scale: float = 1.0
    since: int = 0
    idle: int = 0
    reference: float = -math.inf

    def factor(self, progress: float) -> float:
        """The learning rate in units of the first one, after this part of the run."""
        return cosine(progress, 1.0, FINAL) if self.kind == "cosine" else self.scale

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
        """All of it, as plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float | int | str]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: for other names or types.
        """
        expected = {name: type(value) for name, value in asdict(self).items()}
        if {name: type(value) for name, value in state.items()} != expected:
            raise ValueError(f"a schedule of {sorted(state)} with other names or types than {sorted(expected)}")
        for name, value in state.items():
            setattr(self, name, value)
