"""A classifier of rows and draws, as a test of whether they differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.core.modes import on_cpu

__all__ = ["TwoSample", "classify", "normal_scores"]

PERMUTATIONS = 499
FOLDS = 5
RIDGE = 0.1  # of the mean variance
CROSSED = 24  # columns, or principal components, whose products are features
SINGLE = 200  # most columns that are also features by themselves


@dataclass(frozen=True)
class TwoSample:
    """The result of :func:`classify`.

    Attributes:
        pvalue: the permutation p-value; small if rows and draws differ.
        auc: the probability that the classifier picks the row out of a row and one of its draws, in groups that it was
            not fitted to; a half if they do not differ.

    Example:
        >>> rows, draws = 1 + torch.randn(200, 2), torch.randn(10, 200, 2)
        >>> found = pf.infer.diagnostics.two_sample.classify(rows, draws)
        >>> found.auc > 0.7
        True
    """

    pvalue: float
    auc: float


@on_cpu
@torch.no_grad()
def classify(rows: Tensor, draws: Tensor, seed: int = 0) -> TwoSample:
    r"""Tests whether rows differ from draws by a linear classifier of quadratic features.

    Each row stands with :math:`L` draws of its own, made at its context if there is one.  Values become normal scores
    by their rank, column by column, and features :math:`\phi` are these and their products.  With a row's surplus
    :math:`d_i = \phi(x_i) - \bar\phi_i` over the mean of its group, and the covariance :math:`C` within groups, the
    statistic is that of the ridge classifier,

    .. math:: T = \bar d^\top \bigl(C + \tfrac{\rho}{F} \operatorname{tr} C \, I\bigr)^{-1} \bar d.

    If rows and draws have one law, any member of a group could be the row.  So :math:`T` is compared with that of 499
    random choices, which is exact for any number of rows.  Functions of the context alone cancel.  Many columns are
    reduced: beyond 24, products are those of principal components, and beyond 200, all features are.

    The cost is :math:`n (L + 1) F (F + 500)` products for :math:`F` features.

    Args:
        rows: shape ``(n, columns)``; contexts and log-densities may be among the columns.
        draws: shape ``(L, n, columns)``.
        seed: the seed of permutations, folds and principal components.

    Example:
        >>> rows, draws = torch.randn(200, 2), torch.randn(10, 200, 2)
        >>> pf.infer.diagnostics.two_sample.classify(rows + 1, draws).pvalue
        0.002

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz & Oquab, 2016), arXiv:1610.06545.
    """
    n, size = len(rows), len(draws) + 1
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([rows.unsqueeze(0), draws]).transpose(0, 1).flatten(0, 1)
    features = _features(normal_scores(values), seed).unflatten(0, (n, size))
    features = (features - features.mean(1, keepdim=True)).flatten(0, 1)
    variances, axes = torch.linalg.eigh((features.T @ features / len(features)).double())
    variances = variances.clamp(min=0)
    scale = (variances + RIDGE * variances.mean()).clamp(min=1e-300).rsqrt()
    features = features @ (axes * scale).to(features.dtype)
    chosen = torch.randint(size, (PERMUTATIONS, n), generator=generator)
    statistics = [torch.zeros((), dtype=features.dtype)]
    for part in chosen.split(max(1, 2**22 // len(features))):
        picks = torch.zeros(len(part), n, size, dtype=features.dtype).scatter_(2, part.unsqueeze(-1), 1.0)
        statistics += list((picks.flatten(1) @ features).square().sum(1))
    grouped = features.unflatten(0, (n, size))
    own = grouped[:, 0].sum(0).square().sum()
    least = own * (1 - 1e-5)  # rounding must not turn ties into differences
    pvalue = float((torch.stack(statistics[1:]) >= least).sum() + 1) / (PERMUTATIONS + 1)
    places = torch.randperm(n, generator=generator) * FOLDS // n
    scores = torch.empty(n, size, dtype=features.dtype)
    for fold in range(FOLDS):
        inside = places == fold
        scores[inside] = grouped[inside] @ grouped[~inside, 0].sum(0)
    picked = (scores[:, :1] > scores[:, 1:]).double() + 0.5 * (scores[:, :1] == scores[:, 1:])
    return TwoSample(pvalue, float(picked.mean()))


def normal_scores(values: Tensor) -> Tensor:
    """Turns columns into normal scores by rank; ties share the middle of their ranks."""
    columns = values.T.contiguous()
    ordered = columns.sort(1).values
    below, above = (torch.searchsorted(ordered, columns, right=side) for side in (False, True))
    return torch.special.ndtri((below + above).double() / (2 * columns.shape[1])).float().T


def _features(scores: Tensor, seed: int) -> Tensor:
    """Joins scores, their squares, and products of pairs."""
    count = scores.shape[1]
    crossed, singles = scores, []
    if count > CROSSED:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            crossed = scores @ torch.pca_lowrank(scores, CROSSED)[2]
        singles = [scores, scores.square()] if count <= SINGLE else []
    first, second = torch.triu_indices(crossed.shape[1], crossed.shape[1])
    return torch.cat([crossed, crossed[:, first] * crossed[:, second], *singles], 1)
