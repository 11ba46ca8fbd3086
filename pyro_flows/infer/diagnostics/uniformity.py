"""Tests of whether ranks from 0 to L are uniform."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Binomial

from pyro_flows.core.modes import on_cpu

__all__ = ["band", "chi_square", "ecdf_pvalues", "manner", "pvalues_of"]

REPEATS = 10000  # simulated curves behind a distribution
POINTS = 100  # most points of a compared curve
EXPECTED = 5  # least expected ranks in a chi-square cell
CELLS = 20  # most cells


@on_cpu
def chi_square(ranks: Tensor, num_samples: int) -> Tensor:
    """Tests equal counts in cells: p-values, shape ``(scalars,)``, for ranks of shape ``(simulations, scalars)``."""
    n = len(ranks)
    cells = max(2, min(CELLS, n // EXPECTED, num_samples + 1))
    cell = torch.arange(num_samples + 1) * cells // (num_samples + 1)
    expected = torch.bincount(cell, minlength=cells).double() * n / (num_samples + 1)
    counts = torch.nn.functional.one_hot(cell[ranks], cells).sum(0).double()
    statistic = ((counts - expected).square() / expected).sum(1)
    return torch.special.gammaincc(torch.tensor((cells - 1) / 2, dtype=torch.float64), statistic / 2)


def _smallest_tail(counts: Tensor, cumulative: Tensor) -> Tensor:
    """Finds each row's smallest two-sided binomial probability."""
    at = cumulative.gather(0, counts)
    before = torch.where(counts > 0, cumulative.gather(0, (counts - 1).clamp(min=0)), 0.0)
    return (2 * torch.minimum(at, 1 - before)).clamp(max=1).amin(1)


@lru_cache(maxsize=4)
@on_cpu
def _reference(n: int, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ranks to compare at, binomial functions of their counts, and the sorted statistic of uniform ranks."""
    # Without the last, where all functions are 1.
    grid = torch.linspace(0, num_samples - 1, min(POINTS, num_samples), dtype=torch.float64).round().long()
    chance = (grid + 1).double() / (num_samples + 1)
    cumulative = Binomial(n, chance).log_prob(torch.arange(n + 1.0).double()[:, None]).exp().cumsum(0).clamp(max=1)
    cells = np.diff([0.0, *chance, 1.0])
    counts = torch.from_numpy(np.random.default_rng(0).multinomial(n, cells, REPEATS).cumsum(1)[:, :-1])
    return grid, cumulative, _smallest_tail(counts, cumulative).sort().values


def ecdf_pvalues(ranks: Tensor, num_samples: int) -> Tensor:
    """Simulates p-values, shape ``(scalars,)``: the smallest two-sided pointwise probability along the curve."""
    grid, cumulative, reference = _reference(len(ranks), num_samples)
    rising = ranks.T.contiguous().sort(1).values
    counts = torch.searchsorted(rising, grid.expand(len(rising), -1).contiguous(), right=True)
    at_most = torch.searchsorted(reference, _smallest_tail(counts, cumulative) * (1 + 1e-9), right=True)
    return (at_most + 1).double() / (len(reference) + 1)


def band(n: int, num_samples: int, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns positions from 0 to 1, and limits of the distribution function of ``n`` uniform ranks.

    The whole function is within the limits with probability ``1 - level``.
    """
    grid, cumulative, reference = _reference(n, num_samples)
    # The pointwise level, slightly less, because curves that touch are inside despite rounding.
    pointwise = float(reference[int(level * len(reference))]) * (1 - 1e-6)
    low, high = ((cumulative < limit).sum(0).double() / n for limit in (pointwise / 2, 1 - pointwise / 2))
    return (grid + 1).double() / (num_samples + 1), low, high


def pvalues_of(ranks: Tensor, num_samples: int) -> Tensor:
    """Returns twice the smaller p-value of both tests, shape ``(scalars,)``."""
    return (2 * torch.minimum(chi_square(ranks, num_samples), ecdf_pvalues(ranks, num_samples))).clamp(max=1)


def manner(ranks: Tensor, num_samples: int) -> str:
    """Describes how the ranks of a scalar differ from uniform ones."""
    place = (ranks.double() + 0.5) / (num_samples + 1) * 2 - 1
    lean = float(place.mean()) * math.sqrt(3 * len(place))
    square = place.square() - 1 / 3
    ends = float(square.mean()) / math.sqrt(4 / 45 / len(place))
    if max(abs(lean), abs(ends)) < 2:
        return "ranks are uneven"
    if abs(lean) > abs(ends):
        return "draws lie too low" if lean > 0 else "draws lie too high"
    return "draws are too narrow" if ends > 0 else "draws are too wide"
