"""The score of each row that a fit maximizes."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.core.nonfinite import locate_nonfinite, nonfinite_output, nonfinite_state
from pyro_flows.distributions import Ensemble, Flow
from pyro_flows.infer.density.data import Source
from pyro_flows.infer.density.units import Density, is_plain_flow
from pyro_flows.infer.machine.processes import telling, total

__all__ = ["Likelihood", "Objective", "evaluate", "log_prob_of", "mean_score", "scores_of"]


class Objective(ABC):
    """A score for each row, whose mean is maximized.

    Attributes:
        density: the density in the units of the data.
        noun: the name of a score in messages.
        beyond: the message if only the score is not finite.
        notable: the gain that counts as an improvement.
    """

    density: Flow | Density
    noun: str
    beyond: str
    notable: float

    @abstractmethod
    def scores(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Scores admitted rows, shape ``(rows,)``."""

    def first_nonfinite(self, value: Tensor, context: Tensor | None) -> str | None:
        """Finds where NaN or infinity first appears as rows are scored; ``None`` if only in the score itself."""
        return nonfinite_state(self.density)

    def fixed(self) -> AbstractContextManager[None]:
        """Fixes the scores of the same rows in the same order inside."""
        return nullcontext()


class Likelihood(Objective):
    """The log-likelihood in nats."""

    noun, beyond = "log-likelihood", "every layer is finite, the density at what they give is not"
    notable = 1e-3

    def __init__(self, flow: nn.Module, density: Flow | Density) -> None:
        self.flow, self.density = flow, density
        self._log_prob = log_prob_of(density)

    def scores(self, value: Tensor, context: Tensor | None) -> Tensor:
        return self._log_prob(value, context)

    def first_nonfinite(self, value: Tensor, context: Tensor | None) -> str | None:
        flow, density = self.flow, self.density
        if is_plain_flow(density):
            found = locate_nonfinite(density.chain.inv, value, density.inner_context(context), within=flow)
            return found or nonfinite_state(flow)

        def call() -> None:
            # Validating distributions refuse NaN, but only after the layer that made it was seen.
            with contextlib.suppress(ValueError):
                self.scores(value, context)

        return nonfinite_output(flow, call) or nonfinite_state(flow)


def log_prob_of(density: Flow | Density | Ensemble) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Chooses the fastest log-density of admitted rows."""
    return density.score if is_plain_flow(density) else partial(scores_of, "fit_density", density)


def scores_of(who: str, density: Any, value: Tensor, context: Tensor | None) -> Tensor:
    """Scores rows by a module's ``log_prob``, and refuses any but one number a row."""
    scores = density.log_prob(value) if context is None else density.log_prob(value, context)
    if not isinstance(scores, Tensor) or scores.shape != value.shape[:1]:
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"{who}: expected log_prob of {type(density).__name__} to give one number a row, shape "
            f"{tuple(value.shape[:1])}, got {got}; sum over the dimensions of a row"
        )
    return scores


Score = Callable[[Tensor, Tensor | None], Tensor]


@torch.no_grad()
def evaluate(score: Score, source: Source | None, batch_size: int = 1) -> Iterator[Tensor]:
    """Yields the scores of all rows, in pieces, without a graph."""
    for value, context, *_ in () if source is None else source.chunks(batch_size):
        yield score(value, context)


def mean_score(score: Score, source: Source | None, batch_size: int = 1) -> float:
    """Averages the scores of all rows, by their weights; NaN without rows."""
    whole, rows = 0.0, 0.0
    with telling(), torch.no_grad():
        for value, context, _, weight in () if source is None else source.chunks(batch_size):
            scores = score(value, context).cpu().double()
            own = torch.ones_like(scores) if weight is None else weight.cpu().double()
            whole, rows = whole + (own * scores).sum().item(), rows + own.sum().item()
    whole, rows = total(whole, rows)
    return whole / rows if rows else float("nan")
