"""Settings of a fit, their defaults, and the learning rate's schedule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pyro_flows.core.checks import choice, integer
from pyro_flows.infer.machine.budget import cosine
from pyro_flows.infer.machine.processes import count

__all__ = [
    "CUT",
    "CUTS",
    "FEW_ROWS",
    "FINAL",
    "FOLDS",
    "HELD_OUT_AT_MOST",
    "LEAST",
    "SCHEDULES",
    "Schedule",
    "Settings",
    "Sizes",
]

SCHEDULES = ("plateau", "cosine", "constant")

# Defaults by the amount of data.
SMALLEST_BATCH, LARGEST_BATCH, BATCHES = 64, 1024, 32  # BATCHES: about, in an epoch
TOTAL_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 20_000, 20, 1000
PATIENCE_STEPS, FEWEST_PATIENCE_STEPS, SHORTEST_PATIENCE = 600, 100, 5  # steps: as many as rows, in between
FOLDS, FEW_ROWS = 5, 1000  # of data with fewer rows, by default
ROWS_OF_DECAY = 100  # rows that have a weight decay of 1; it falls with their number
HELD_OUT_AT_MOST = 20_000  # rows of a random validation part

# Plateau: factor of a cut; cuts in vain before the end; the factor that ends training.
CUT, CUTS, LEAST = 0.3, 2, 1e-3
FINAL = 0.01  # the cosine's last factor


class Sizes(NamedTuple):
    """Sizes of a fit: rows, epochs, and the steps of the longest run that limits allow."""

    batch_size: int
    max_epochs: int
    patience: int
    total_steps: int


@dataclass(frozen=True)
class Settings:
    """Keywords of :func:`~pyro_flows.infer.density.fit.fit_density`, checked.

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
    weight_decay: float | None
    clip_norm: float | None
    average: float
    checkpoint_every: int
    compile: bool | str
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
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"fit_density: expected weight_decay >= 0, got {self.weight_decay!r}")
        if not isinstance(self.compile, bool):
            choice("fit_density", "compile", self.compile, ("auto",))
        choice("fit_density", "schedule", self.schedule, SCHEDULES)

    def batch_size_for(self, rows: int) -> int:
        """Returns the chosen batch size, or a power of two near a thirty-second of the rows."""
        if self.batch_size is not None:
            if self.batch_size > rows:
                raise ValueError(
                    f"fit_density: batch_size={self.batch_size} is more than the {rows} rows to train on; "
                    "choose a smaller one or leave it out"
                )
            return self.batch_size
        near = 2 ** round(math.log2(max(rows / BATCHES, 1.0)))
        return min(max(near, SMALLEST_BATCH), LARGEST_BATCH, rows)

    def weight_decay_for(self, rows: float, from_gaussian: bool) -> float:
        """Returns the chosen weight decay, or one that draws a flow of few rows back to the Gaussian it starts as."""
        if self.weight_decay is not None:
            return self.weight_decay
        return min(ROWS_OF_DECAY / rows, 1.0) if from_gaussian and rows < FEW_ROWS else 0.0

    def sizes(self, batch_size: int, steps_per_epoch: int, rows: int) -> Sizes:
        """Computes sizes; an epoch's steps and the rows to train on set the defaults."""
        epochs, patience = self.max_epochs, self.patience
        if epochs is None and self.steps is not None:
            epochs = -(-self.steps // steps_per_epoch)
        elif epochs is None:
            epochs = min(max(-(-TOTAL_STEPS // steps_per_epoch), FEWEST_EPOCHS), MOST_EPOCHS)
        if patience is None:
            steps = min(max(rows, FEWEST_PATIENCE_STEPS), PATIENCE_STEPS)  # few rows are overfitted soon
            patience = max(SHORTEST_PATIENCE, -(-steps // steps_per_epoch))
        total = epochs * steps_per_epoch
        return Sizes(batch_size, epochs, patience, total if self.steps is None else min(total, self.steps))

    def identity(self, sizes: Sizes, optimizer: str) -> dict[str, Any]:
        """The settings on which a resumed fit must agree: limits count only for the cosine."""
        chosen = {**asdict(self), "batch_size": sizes.batch_size, "patience": sizes.patience, "optimizer": optimizer}
        del chosen["checkpoint_every"], chosen["compile"]
        if count() > 1:
            chosen["processes"] = count()
        limits = {name: chosen.pop(name) for name in ("max_epochs", "steps", "seconds")}
        return {**chosen, **limits, "max_epochs": sizes.max_epochs} if self.schedule == "cosine" else chosen


@dataclass
class Schedule:
    """The learning rate's factor and the response to a score that stands still.

    Attributes:
        notable: the gain that counts as an improvement.
        scale: the factor left by cuts.
        since: epochs since the last improvement or cut.
        idle: cuts since the last improvement.
        reference: the score at the last improvement.
    """

    kind: str
    patience: int
    notable: float = 1e-3
    scale: float = 1.0
    since: int = 0
    idle: int = 0
    reference: float = -math.inf

    def factor(self, progress: float) -> float:
        """Returns the learning rate's factor after this part of the run."""
        return cosine(progress, 1.0, FINAL) if self.kind == "cosine" else self.scale

    def judge(self, score: float) -> str:
        """Responds to an epoch's score: ``"go"``, ``"back"`` to the best state, or ``"stop"``."""
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
