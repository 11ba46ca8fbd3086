"""The Gaussian of data: a normal of full covariance, shrunk where rows are few, and linear in the context."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pyro_flows.core.chain import Chain, leaves
from pyro_flows.distributions import DiagonalNormal, Flow
from pyro_flows.distributions.made import MADE, AutoregressiveModel
from pyro_flows.distributions.queries.mixtures import as_mixture
from pyro_flows.infer.density.units import (
    Density,
    StandardizedDensity,
    StandardizedFlow,
    coloring_of,
    is_plain_flow,
    split_chain,
    standardized,
)
from pyro_flows.transforms import ActNorm, Coloring

__all__ = [
    "better",
    "can_start",
    "coloring",
    "fit_gaussian",
    "sample_size",
    "shrinkage",
    "start_as_gaussian",
    "started",
]

LARGEST_SAMPLE = 20_000  # rows that a shrinkage, and the start of a fit, are computed from; fewer of large events
_NUMBERS = 2**23  # of them
_FOLDS = 5
_PIECE = 2048  # rows scored at once
_FEWEST = 2 * _FOLDS  # rows to choose a shrinkage by; fewer have a diagonal covariance
_LAMBDAS = torch.logspace(-6, 0, 25, dtype=torch.float64, device="cpu")


def _moments(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, standard deviations (1 for a constant column) and correlations of flat rows, in float64."""
    weight = weight / weight.mean()
    loc = (weight * rows).mean(0)
    centered = weight.sqrt() * (rows - loc)
    std = (centered.square().sum(0) / max(len(rows) - 1, 1)).sqrt()
    scale = torch.where(std > 0, std, 1.0)
    matrix = centered.T @ centered / (max(len(rows) - 1, 1) * torch.outer(scale, scale))
    matrix.fill_diagonal_(1.0)
    return loc, scale, matrix


def shrinkage(rows: Tensor, context_dim: int = 0, weight: Tensor | None = None) -> float:
    r"""Chooses the :math:`\lambda` of :math:`(1 - \lambda) R + \lambda I` for a correlation matrix.

    It is the best of 25, from 1e-6 to 1, by the likelihood of held-out rows over five folds, given the context.
    Closed forms, which aim at the squared error of the matrix, shrink strong correlations too much for a likelihood.

    Args:
        rows: shape ``(rows, context_dim + D)``, contexts first.
        context_dim: the number of columns that are given, whose own likelihood does not count.
        weight: the rows' weights, by default equal.

    Example:
        >>> from pyro_flows.infer.density.gaussian import shrinkage
        >>> rows = torch.randn(5000, 3).cumsum(1)
        >>> shrinkage(rows) < 0.01  # so many rows show the correlations
        True
    """
    rows = rows[:LARGEST_SAMPLE].detach().cpu().double()
    own = _column(rows, weight)
    if len(rows) < _FEWEST:
        return 1.0
    total = torch.zeros_like(_LAMBDAS)
    for k in range(_FOLDS):
        others = torch.arange(len(rows), device="cpu") % _FOLDS != k
        loc, scale, matrix = _moments(rows[others], own[others])
        standard, held = (rows[k::_FOLDS] - loc) / scale, own[k::_FOLDS]
        total += _likelihoods(standard, matrix, held)
        if context_dim:
            total -= _likelihoods(standard[:, :context_dim], matrix[:context_dim, :context_dim], held)
    return float(_LAMBDAS[total.argmax()])


def _column(rows: Tensor, weight: Tensor | None) -> Tensor:
    """The weights of as many rows as a column in float64 on the CPU, 1 by default."""
    if weight is None:
        return rows.new_ones(len(rows), 1)
    return weight[: len(rows)].detach().cpu().double().unsqueeze(-1)


def _likelihoods(rows: Tensor, matrix: Tensor, weight: Tensor) -> Tensor:
    """The log-likelihood of rows for each shrinkage of a correlation matrix, up to a constant."""
    values, vectors = torch.linalg.eigh(matrix)
    shrunk = (1 - _LAMBDAS[:, None]) * values.clamp(min=0.0) + _LAMBDAS[:, None]
    squares = (weight * (rows @ vectors).square()).sum(0)
    return -0.5 * ((squares / shrunk).sum(1) + weight.sum() * shrunk.log().sum(1))


def sample_size(row: Tensor) -> int:
    """Returns how many rows like this one are enough to start from."""
    return min(LARGEST_SAMPLE, max(1000, _NUMBERS // max(row.numel(), 1)))


def coloring(rows: Tensor, event_shape: torch.Size, context_dim: int = 0, weight: Tensor | None = None) -> Coloring:
    """Makes a standard normal the Gaussian of flat rows, contexts first; in float64, on the CPU."""
    rows = rows.detach().cpu().double()
    mean, scale, matrix = _moments(rows, _column(rows, weight))
    covariance = (1 - shrinkage(rows, context_dim, weight)) * matrix
    covariance.fill_diagonal_(1.0)
    covariance *= torch.outer(scale, scale)
    loc, slope = mean[context_dim:], None
    if context_dim:
        above, below = covariance.split([context_dim, len(loc)])
        given, both, own = above[:, :context_dim], below[:, :context_dim], below[:, context_dim:]
        slope = torch.linalg.solve(given, both, left=False)
        loc = loc - slope @ mean[:context_dim]
        covariance = own - slope @ both.T
    return Coloring(loc.reshape(event_shape), torch.linalg.cholesky(covariance), slope)


def fit_gaussian(value: Tensor, context: Tensor | None = None, weight: Tensor | None = None) -> Flow:
    r"""Fits a normal of full covariance to rows, as a flow of one linear part, in their dtype.

    :math:`\log p(y \mid c) = \log N(y; t + B c, \Sigma)`.  Columns keep their variances; correlations, with the context
    among them, are shrunk towards 0 by the factor that scores best on held-out rows (:func:`shrinkage`).

    Args:
        value: shape ``(rows, *event_shape)``.
        context: shape ``(rows, context_dim)``.
        weight: how much each row counts, shape ``(rows,)``; by default all alike.

    Example:
        >>> from pyro_flows.infer.density.gaussian import fit_gaussian
        >>> flow = fit_gaussian(torch.randn(100, 3))
        >>> flow.sample((5,)).shape
        torch.Size([5, 3])
    """
    flat = value.flatten(1)
    rows = flat if context is None else torch.cat([context, flat], 1)
    return Flow(coloring(rows, value.shape[1:], rows.shape[1] - flat.shape[1], weight).to(value)).eval()


def _made_of(density: Flow | Density, value: Tensor) -> tuple[AutoregressiveModel | None, Tensor]:
    """Returns the autoregressive model inside of a density, if there is one, and rows in its units."""
    if isinstance(density, StandardizedDensity):
        return _made_of(density.module, (value - density.loc) / density.scale)
    return (density if isinstance(density, AutoregressiveModel) else None), value


@torch.no_grad()
def can_start(density: Flow | Density, value: Tensor, context: Tensor | None) -> bool:
    """Tells whether a density starts as the Gaussian of rows, or as the independent columns of discrete ones.

    So do flows with a :class:`~pyro_flows.transforms.linear.Coloring`, and autoregressive models that learned nothing.
    """
    model, rows = _made_of(density, value[:2])
    if isinstance(model, MADE):
        return model.linear
    if model is None:
        return coloring_of(density) is not None
    params = model.params(rows, None if context is None else context[:2])
    return torch.equal(params, params[:1].expand_as(params))


@torch.no_grad()
def start_as_gaussian(
    density: Flow | Density, value: Tensor, context: Tensor | None, weight: Tensor | None = None
) -> None:
    """Makes a flow whose chain is linear start as the Gaussian of rows in its units.

    In general, the base becomes the Gaussian of the rows pulled back to it, so that a chain trained before keeps what
    it has learned.  A base of Student's t, or of a mixture of normals, gets its mean and covariance.  Nothing changes
    if that is not finite, or before the first batch sets an ``ActNorm``.

    A fresh autoregressive model gets the columns of the rows as its marginals, and a MADE of one order the linear
    regressions of normal and mixture columns on those before them, without the context.
    """
    unset = any(isinstance(each, ActNorm) and not each.initialized for each in density.modules())
    if unset or len(value) < 2 or not can_start(density, value, context):
        return
    density.eval()
    part, (model, rows) = coloring_of(density), _made_of(density, value)
    with suppress(RuntimeError, ValueError, ArithmeticError):  # training says what is wrong, and where
        if model is not None:
            _start_made(model, rows, weight)
        elif part is not None and is_plain_flow(density):
            _start_flow(density, part, value, context, weight)


def _start_flow(density: Flow, part: Coloring, value: Tensor, context: Tensor | None, weight: Tensor | None) -> None:
    rest = Chain(list(leaves(density.chain))[1:])
    context = density.inner_context(context)
    pieces = zip(value.split(_PIECE), [None] * len(value) if context is None else context.split(_PIECE), strict=False)
    latent = torch.cat([rest._inverse_and_ladj(*piece)[0] for piece in pieces])
    rows = latent if context is None else torch.cat([context, latent], 1)
    if rows.isfinite().all():
        made = coloring(rows, part.event_shape, part.context_dim, weight)
        loc, factor = made.loc, made.factor
        if type(density.base) is not DiagonalNormal:  # of another mean and variance
            mean, root = _spread_of(density.base())
            factor = torch.linalg.solve_triangular(root, factor, upper=False, left=False)
            loc = loc - factor @ mean
        part.place(loc, factor, made.slope)


def _spread_of(base: Any) -> tuple[Tensor, Tensor]:
    """The mean of a base, and a triangular root of its covariance; where there is none, 0 and 1."""
    normals = as_mixture(base)
    if normals is None:
        mean, variance = (each.cpu().double() for each in (base.mean, base.variance))
        known = mean.isfinite() & variance.isfinite()
        return torch.where(known, mean, 0.0), torch.where(known, variance, 1.0).sqrt().diag()
    weights, places, cov = (each.cpu() for each in (normals.log_weights.exp(), normals.loc, normals.cov))
    mean = weights @ places
    apart = places - mean
    whole = (weights[:, None, None] * cov).sum(0) + apart.T @ (weights.unsqueeze(-1) * apart)
    return mean, torch.linalg.cholesky(whole)


def _start_made(model: AutoregressiveModel, value: Tensor, weight: Tensor | None) -> None:
    rows = value.detach().cpu().clone()
    chosen = slice(None) if weight is None else _by_weight(weight)
    slopes = None
    if isinstance(model, MADE) and model.net.is_direct and not model.any_order:
        order = model.order.cpu()
        own = order[model.head.locations().any(1).cpu()[order]]
        if len(own):
            flat = rows[:, own].double()
            made = coloring(flat, torch.Size((len(own),)), 0, weight)
            size, eye = made.factor.diagonal(), torch.eye(len(own), dtype=torch.float64, device="cpu")
            # Its factor L says how each number follows from those before it: x = B x + t + (diagonal of L) z.
            back = eye - size.unsqueeze(-1) * torch.linalg.solve_triangular(made.factor, eye, upper=False)
            rest, shift = flat - flat @ back.T, made.loc - back @ made.loc
            std, mean = torch.std_mean(rest[chosen], 0, correction=0)
            rows[:, own] = (shift + (rest - mean) * (size / std)).to(rows)
            slopes = torch.zeros(model.input_dim, model.input_dim, dtype=torch.float64, device="cpu")
            slopes[own.unsqueeze(-1), own] = back
    model.fit_marginals(rows[chosen], as_normals=True)
    if slopes is not None and isinstance(model, MADE):
        model.set_slopes(slopes)


def _by_weight(weight: Tensor) -> Tensor:
    """Chooses as many rows as there are, each about as often as its weight says."""
    ends = weight.detach().cpu().double().cumsum(0)
    places = (torch.arange(len(ends), dtype=torch.float64, device="cpu") + 0.5) * (ends[-1] / len(ends))
    return torch.searchsorted(ends, places).clamp(max=len(ends) - 1)


def started(
    flow: Flow | Density, fitted: Flow | Density, value: Tensor, context: Tensor | None, weight: Tensor | None = None
) -> Flow | Density:
    """Puts a fresh model in the units of a fitted one of the same architecture, as the Gaussian of rows.

    A flow shares its parts with the result; other models are copied.
    """
    made: Flow | Density
    if is_plain_flow(flow) and is_plain_flow(fitted):
        units: Any = leaves(fitted.chain)[1 + len(split_chain(flow.chain)[0])]
        own = (fitted.context_loc, fitted.context_scale) if isinstance(fitted, StandardizedFlow) else ()
        made = standardized(flow, units.loc, units.scale, *own)
    else:
        made = copy.deepcopy(flow)
        if isinstance(fitted, StandardizedDensity):
            made = StandardizedDensity(made, copy.deepcopy(dict(fitted._buffers)))
    start_as_gaussian(made, value, context, weight)
    return made.eval()


def better(gains: Tensor, weight: Tensor | None = None) -> bool:
    """Tells whether paired differences of scores, of rows with weights of mean 1, are positive by two standard errors.

    Each counts for one nat at most, so that single rows do not decide.
    """
    counted, count = gains.clamp(-1.0, 1.0), len(gains)
    weight = torch.ones_like(counted) if weight is None else weight
    mean = (weight * counted).mean()
    deviations = weight * (counted - mean)
    return bool(mean > 2 * (deviations.square().sum() / (count * (count - 1))).sqrt())
