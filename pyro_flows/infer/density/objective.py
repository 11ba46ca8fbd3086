"""The score of each row that a fit maximizes."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pyro_flows.core.nonfinite import locate_nonfinite, nonfinite_output, nonfinite_state
from pyro_flows.distributions import Flow
from pyro_flows.infer.density.data import Batch, Rows, Source, name_rows
from pyro_flows.infer.density.units import Density, is_plain_flow

__all__ = [
    "Likelihood",
    "Objective",
    "bad_gradient",
    "bad_score",
    "evaluate",
    "first_nonfinite",
    "log_prob_of",
    "mean_score",
]

_REMEDY = "try a smaller lr or clip_norm, a flow in float64 (flow.double()), and look at the data for outliers"


def first_nonfinite(flow: nn.Module, density: Flow | Density, batch: Batch) -> str | None:
    """Finds where NaN or infinity first appears as rows are scored; ``None`` if only in the score itself.

    The answer names parts as ``flow`` does.
    """
    value, context, _ = batch
    if is_plain_flow(density):
        found = locate_nonfinite(density.chain.inv, value, density.inner_context(context), within=flow)
        return found or nonfinite_state(flow)

    def call() -> None:
        # Validating distributions refuse NaN, but only after the layer that made it was seen.
        with contextlib.suppress(ValueError):
            density.log_prob(value) if context is None else density.log_prob(value, context)

    return nonfinite_output(flow, call) or nonfinite_state(flow)


def bad_score(what: str, scores: Tensor, index: Tensor | None, found: str) -> str:
    """Describes scores that are not finite: which, in which rows, and where that begins."""
    rows = (~scores.isfinite()).nonzero()[:, 0].cpu()
    which = f"{len(rows)} of {len(scores)} rows"
    if index is not None and len(rows):
        which += f" ({name_rows(index[rows])} as given)"
    return f"fit_density: the {what}, from {which}; {found}; {_REMEDY}"


def bad_gradient(flow: nn.Module, norm: float) -> str:
    """Names the parameters whose gradients are not finite."""
    names = [name for name, p in flow.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    which = f"that of {', '.join(names[:5])}{', …' if len(names) > 5 else ''} is not finite"
    if not names:
        which = "each gradient is finite, but their squares overflow"
    return f"fit_density: the norm of the gradient is {norm}: {which}; {_REMEDY}"


_CHUNK = 2**18  # numbers scored at once without a gradient


class Objective(ABC):
    """A score for each row, whose mean is maximized.

    Attributes:
        noun: the name of a score in messages.
        beyond: the message if only the score is not finite.
        notable: the gain that counts as an improvement.
    """

    noun: str
    beyond: str
    notable: float

    @abstractmethod
    def scores(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Scores admitted rows, shape ``(rows,)``."""

    @abstractmethod
    def first_nonfinite(self, batch: Batch) -> str | None:
        """Finds where NaN or infinity first appears; ``None`` if only in the score itself."""

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

    def first_nonfinite(self, batch: Batch) -> str | None:
        return first_nonfinite(self.flow, self.density, batch)


def log_prob_of(density: Flow | Density) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Chooses the fastest log-density of admitted rows."""
    if is_plain_flow(density):
        return density.score

    def of_module(value: Tensor, context: Tensor | None) -> Tensor:
        scores = density.log_prob(value) if context is None else density.log_prob(value, context)
        if not isinstance(scores, Tensor) or scores.shape != value.shape[:1]:
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"fit_density: expected log_prob of {type(density).__name__} to give one number a row, shape "
                f"{tuple(value.shape[:1])}, got {got}; sum over the dimensions of a row"
            )
        return scores

    return of_module


@torch.no_grad()
def evaluate(score: Callable[[Tensor, Tensor | None], Tensor], source: Source, batch_size: int = 1) -> Iterator[Tensor]:
    """Yields the scores of all rows, in pieces, without a graph."""
    size = 1
    if isinstance(source, Rows) and len(source):
        size = max(batch_size, _CHUNK // max(source.value[0].numel(), 1), 1)
    for value, context, _ in source.chunks(size):
        yield score(value, context)


def mean_score(score: Callable[[Tensor, Tensor | None], Tensor], source: Source, batch_size: int = 1) -> float:
    """Averages the scores of all rows; NaN without rows."""
    total, rows = 0.0, 0
    for scores in evaluate(score, source, batch_size):
        total, rows = total + scores.cpu().double().sum().item(), rows + len(scores)
    return total / rows if rows else float("nan")
