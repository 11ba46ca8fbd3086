"""The Gaussian of data: a normal of full covariance, shrunk where rows are few, and linear in the context."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.machine.processes import count, everyone
from pyro_flows.transforms import Coloring

__all__ = ["Moments", "fit_gaussian", "shrinkage"]

_FOLDS = 5
_FEWEST = 2 * _FOLDS  # rows to choose a shrinkage by; fewer have a diagonal covariance
_ROWS = 20_000  # to choose it by, where there are more
_LAMBDAS = torch.logspace(-6, 0, 25, dtype=torch.float64, device="cpu")


class Moments:
    """Mean and covariance, in float64, of flat rows that come in pieces."""

    def __init__(self) -> None:
        self.rows = 0
        self.mean = self.products = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Adds a piece, shape ``(rows, D)``."""
        if len(rows):
            piece = rows.detach().cpu().double()
            mean = piece.mean(0)
            self._join(len(piece), mean, (piece - mean).T @ (piece - mean))

    def _join(self, rows: int, mean: Tensor, products: Tensor) -> None:
        if not self.rows:
            self.mean, self.products = torch.zeros_like(mean), torch.zeros_like(products)
        # Chan's update, which does not cancel where the mean is large.
        share, gap = rows / (self.rows + rows), mean - self.mean
        self.products = self.products + products + torch.outer(gap, gap) * self.rows * share
        self.mean = self.mean + gap * share
        self.rows += rows

    def of_all(self) -> Moments:
        """Joins the moments of all processes."""
        if count() == 1:
            return self
        joined = Moments()
        for each in everyone(self):
            if each.rows:
                joined._join(each.rows, each.mean, each.products)
        return joined

    def scale(self) -> Tensor:
        """Standard deviations; 1 for a constant column."""
        squares = self.products.diagonal() / max(self.rows - 1, 1)
        return torch.where(squares > 0, squares.sqrt(), 1.0)

    def correlation(self) -> Tensor:
        """The correlation matrix, with ones on its diagonal."""
        scale = self.scale()
        found = self.products / (max(self.rows - 1, 1) * torch.outer(scale, scale))
        found.fill_diagonal_(1.0)
        return found


def shrinkage(rows: Tensor, context_dim: int = 0) -> float:
    r"""Chooses the :math:`\lambda` of :math:`(1 - \lambda) R + \lambda I` for a correlation matrix.

    It is the best of 25, from 1e-6 to 1, by the likelihood of held-out rows over five folds, given the context.
    Closed forms, which aim at the squared error of the matrix, shrink strong correlations too much for a likelihood.

    Args:
        rows: shape ``(rows, context_dim + D)``, contexts first.
        context_dim: the number of columns that are given, whose own likelihood does not count.
    """
    rows = rows[:_ROWS].detach().cpu().double()
    if len(rows) < _FEWEST:
        return 1.0
    total = torch.zeros_like(_LAMBDAS)
    for k in range(_FOLDS):
        kept = Moments()
        kept.add(rows[torch.arange(len(rows), device="cpu") % _FOLDS != k])
        standard = (rows[k::_FOLDS] - kept.mean) / kept.scale()
        matrix = kept.correlation()
        total += _likelihoods(standard, matrix)
        if context_dim:
            total -= _likelihoods(standard[:, :context_dim], matrix[:context_dim, :context_dim])
    return float(_LAMBDAS[total.argmax()])


def _likelihoods(rows: Tensor, matrix: Tensor) -> Tensor:
    """The log-likelihood of rows for each shrinkage of a correlation matrix, up to a constant."""
    values, vectors = torch.linalg.eigh(matrix)
    shrunk = (1 - _LAMBDAS[:, None]) * values.clamp(min=0.0) + _LAMBDAS[:, None]
    squares = (rows @ vectors).square().sum(0)
    return -0.5 * ((squares / shrunk).sum(1) + len(rows) * shrunk.log().sum(1))


def coloring(moments: Moments, weight: float, event_shape: torch.Size, context_dim: int = 0) -> Coloring:
    """Makes a standard normal the Gaussian of moments, shrunk by ``weight``, in float64; contexts come first."""
    scale = moments.scale()
    covariance = (1 - weight) * moments.correlation()
    covariance.fill_diagonal_(1.0)
    covariance *= torch.outer(scale, scale)
    loc, slope = moments.mean[context_dim:], None
    if context_dim:
        given, both, own = (
            covariance[:context_dim, :context_dim],
            covariance[context_dim:, :context_dim],
            covariance[context_dim:, context_dim:],
        )
        slope = torch.linalg.solve(given, both, left=False)
        loc = loc - slope @ moments.mean[:context_dim]
        covariance = own - slope @ both.T
    return Coloring(loc.reshape(event_shape), torch.linalg.cholesky(covariance), slope)


def fit_gaussian(value: Tensor, context: Tensor | None = None) -> Flow:
    r"""Fits a normal of full covariance to rows, as a flow of one linear part, in their dtype.

    :math:`\log p(y \mid c) = \log N(y; t + B c, \Sigma)`.  Columns keep their variances; correlations, with the context
    among them, are shrunk towards 0 by the factor that scores best on held-out rows (:func:`shrinkage`).

    Args:
        value: shape ``(rows, *event_shape)``.
        context: shape ``(rows, context_dim)``.
    """
    flat = value.flatten(1)
    rows = flat if context is None else torch.cat([context, flat], 1)
    context_dim = 0 if context is None else context.shape[1]
    moments = Moments()
    moments.add(rows)
    made = coloring(moments, shrinkage(rows, context_dim), value.shape[1:], context_dim)
    return Flow(made.to(value)).eval()
