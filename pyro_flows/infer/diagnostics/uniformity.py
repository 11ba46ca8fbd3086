"""Tests of whether ranks from 0 to L are uniform."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Generator, Tensor

__all__ = ["adjusted_level", "band", "chi_square", "ecdf_pvalues"]

REPEATS = 10000  # simulated curves behind a distribution
POINTS = 100  # at which the distribution functions are compared, at most
EXPECTED = 5  # ranks in a cell of the chi-square test, at least
CELLS = 20  # of that test, at most


def chi_square(ranks: Tensor, num_samples: int) -> Tensor:
    """p-values of equal counts, shape ``(scalars,)``, for ranks of shape ``(simulations, scalars)``.

    The cells are as equal as the ``num_samples + 1`` ranks allow; the reference is the chi-square distribution.
    """
    n = len(ranks)
    cells = max(2, min(CELLS, n // EXPECTED, num_samples + 1))
    cell = torch.arange(num_samples + 1) * cells // (num_samples + 1)
    expected = torch.bincount(cell, minlength=cells).double() * n / (num_samples + 1)
    counts = torch.nn.functional.one_hot(cell[ranks], cells).sum(0).double()
    statistic = ((counts - expected).square() / expected).sum(1)
    return torch.special.gammaincc(torch.tensor((cells - 1) / 2, dtype=torch.float64), statistic / 2)


def _grid(num_samples: int) -> Tensor:
    """Ranks at which distribution functions are compared, without the last, where all are 1."""
    return torch.linspace(0, num_samples - 1, min(POINTS, num_samples), dtype=torch.float64).round().long()


def _cumulative(n: int, chance: Tensor) -> Tensor:
    """Binomial distribution functions of ``n`` trials, from 0 to ``n`` successes, shape ``(n + 1, points)``."""
    k = torch.arange(n + 1, dtype=torch.float64)[:, None]
    log_count = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return (log_count + k * chance.log() + (n - k) * torch.log1p(-chance)).exp().cumsum(0).clamp(max=1)


def _smallest_tail(counts: Tensor, cumulative: Tensor) -> Tensor:
    """For each row of counts below grid points the smallest two-sided binomial probability along it."""
    at = cumulative.gather(0, counts)
    before = torch.where(counts > 0, cumulative.gather(0, (counts - 1).clamp(min=0)), 0.0)
    return (2 * torch.minimum(at, 1 - before)).clamp(max=1).amin(1)


@lru_cache(maxsize=4)
def _reference(n: int, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """The grid, the binomial functions there, and the statistic of curves of uniform ranks, sorted."""
    grid = _grid(num_samples)
    chance = (grid + 1).double() / (num_samples + 1)
    cumulative = _cumulative(n, chance)
    generator = Generator().manual_seed(0)
    found = []
    rows = max(1, (1 << 22) // (n + len(grid)))
    for part in torch.arange(REPEATS).split(rows):
        ranks = torch.randint(num_samples + 1, (len(part), n), generator=generator, device="cpu").sort(1).values
        counts = torch.searchsorted(ranks, grid.expand(len(part), -1).contiguous(), right=True)
        found.append(_smallest_tail(counts, cumulative))
    return grid, cumulative, torch.cat(found).sort().values


def ecdf_pvalues(ranks: Tensor, num_samples: int) -> Tensor:
    """p-values of the whole empirical distribution function, shape ``(scalars,)``, by simulation.

    The statistic is the smallest pointwise binomial probability, two-sided, along the curve.

    References:
        Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit Evaluation and Multiple Sample
        Comparison (Säilynoja et al., 2021), arXiv:2103.10522.
    """
    grid, cumulative, reference = _reference(len(ranks), num_samples)
    sorted_ranks = ranks.T.contiguous().sort(1).values
    counts = torch.searchsorted(sorted_ranks, grid.expand(len(sorted_ranks), -1).contiguous(), right=True)
    at_most = torch.searchsorted(reference, _smallest_tail(counts, cumulative) * (1 + 1e-9), right=True)
    return (at_most + 1).double() / (len(reference) + 1)


def adjusted_level(n: int, num_samples: int, level: float) -> float:
    """The pointwise level at which a whole curve of ``n`` uniform ranks leaves its band with probability ``level``."""
    *_, reference = _reference(n, num_samples)
    # Slightly less, so that rounding does not push out curves that just touch.
    return float(reference[int(level * len(reference))]) * (1 - 1e-6)


def band(n: int, num_samples: int, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Positions from 0 to 1, and limits of the empirical distribution function of ``n`` ranks at each.

    The number of ranks below a position is within the limits with probability ``1 - level`` at least.
    """
    grid = _grid(num_samples)
    chance = (grid + 1).double() / (num_samples + 1)
    cumulative = _cumulative(n, chance)
    low = (cumulative < level / 2).sum(0)
    high = (cumulative < 1 - level / 2).sum(0)
    return chance, low.double() / n, high.double() / n
