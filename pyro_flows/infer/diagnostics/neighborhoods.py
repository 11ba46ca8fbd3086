"""Calibration by neighborhoods of a context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_flows.core.modes import on_cpu
from pyro_flows.infer.diagnostics.two_sample import normal_scores

__all__ = ["local_pvalues", "neighborhoods"]

FEWEST = 25  # rows of a neighborhood
HALVINGS = 4


@on_cpu
def neighborhoods(context: Tensor) -> Tensor:
    """Numbers up to 16 neighborhoods of contexts, shape ``(rows,)``, from 0.

    Contexts become normal scores by rank.  A neighborhood with at least 50 rows is halved along its principal axis, but
    rows of one value stay together.

    Args:
        context: shape ``(rows, context_dim)``.

    Example:
        >>> from pyro_flows.infer.diagnostics.neighborhoods import neighborhoods
        >>> neighborhoods(torch.randn(200, 2)).bincount().tolist()
        [25, 25, 25, 25, 25, 25, 25, 25]
    """
    scores = normal_scores(context)
    found = [torch.arange(len(scores))]
    for _ in range(HALVINGS):
        found = [half for rows in found for half in _halves(scores, rows)]
    numbers = torch.empty(len(scores), dtype=torch.long)
    for k, rows in enumerate(found):
        numbers[rows] = k
    return numbers


def _halves(scores: Tensor, rows: Tensor) -> list[Tensor]:
    """Halves rows along their principal axis, unless one half would be too small."""
    own = scores[rows] - scores[rows].mean(0)
    place = own @ torch.linalg.svd(own, full_matrices=False)[2][0] if own.any() else own[:, 0]
    middle = place.median()
    sides = min((place <= middle, place < middle), key=lambda side: abs(2 * int(side.sum()) - len(rows)))
    halves = [rows[sides], rows[~sides]]
    return halves if min(map(len, halves)) >= FEWEST else [rows]


def local_pvalues(places: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    r"""Tests whether places are uniform in each neighborhood.

    In a neighborhood of :math:`m` rows, :math:`\sqrt{12 m}\,(\bar u - 1/2)` and :math:`\sqrt{180 m}\,(\overline{(u -
    1/2)^2} - 1/12)` are nearly independent standard normals, if the places :math:`u` are uniform.  Twice the smaller
    p-value counts, of their squares' sum and of the largest.

    Args:
        places: between 0 and 1, shape ``(rows, scalars)``.
        numbers: the rows' neighborhoods, shape ``(rows,)``.

    Returns:
        p-values, shape ``(scalars,)``, and the normals, shape ``(neighborhoods, scalars, 2)``: positive ones where
        places lie too high, and too far out.

    Example:
        >>> from pyro_flows.infer.diagnostics import neighborhoods
        >>> numbers = neighborhoods.neighborhoods(torch.randn(200, 1))
        >>> pvalues, normals = neighborhoods.local_pvalues(torch.rand(200, 3), numbers)
        >>> pvalues.shape, normals.shape
        (torch.Size([3]), torch.Size([8, 3, 2]))
    """
    scores = []
    for k in range(int(numbers.max()) + 1):
        own = places[numbers == k].double() - 0.5
        shift, spread = own.mean(0), own.square().mean(0) - 1 / 12
        scores.append(torch.stack([shift * math.sqrt(12 * len(own)), spread * math.sqrt(180 * len(own))], -1))
    normals = torch.stack(scores)
    count = 2 * len(normals)
    sums = normals.square().sum((0, 2))
    by_sum = torch.special.gammaincc(torch.full_like(sums, count / 2), sums / 2)
    by_largest = count * torch.special.erfc(normals.abs().amax((0, 2)) / math.sqrt(2))
    return (2 * torch.minimum(by_sum, by_largest)).clamp(max=1), normals
