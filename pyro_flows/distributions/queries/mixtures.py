"""Mixtures of normals or Student's t whose marginals and conditionals are known."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, MultivariateNormal, Normal

from pyro_flows.core.checks import joint_shape

__all__ = ["Mixture", "as_mixture", "fit_mixture"]

CLOSE = 1e-6  # of the smallest to the largest variance of a fitted component


class Mixture:
    r"""A mixture :math:`\sum_k w_k f(x; \mu_k, \Sigma_k)` of normals, or of multivariate t with ``df`` degrees.

    Args:
        log_weights: shape ``(*batch, K)``, normalized.
        loc: :math:`\mu`, shape ``(*batch, K, n)``.
        cov: :math:`\Sigma`, shape ``(*batch, K, n, n)``; its batch may be smaller, to broadcast.
        df: degrees of freedom, ``None`` for normals.
        stretch: factors of the covariances, shape ``(*batch, K)``, 1 by default.
    """

    def __init__(
        self, log_weights: Tensor, loc: Tensor, cov: Tensor, df: int | None = None, stretch: Tensor | None = None
    ) -> None:
        self.log_weights, self.loc, self.cov, self.df = log_weights, loc, cov, df
        self.stretch = torch.ones_like(log_weights) if stretch is None else stretch

    def at(self, places: Tensor) -> Mixture:
        """The marginal of some places, by their indices."""
        cov = self.cov.index_select(-1, places).index_select(-2, places)
        return Mixture(self.log_weights, self.loc.index_select(-1, places), cov, self.df, self.stretch)

    def _standardized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Squared Mahalanobis distances ``(*batch, K)`` and log-determinants of the unstretched covariances."""
        root = torch.linalg.cholesky(self.cov)
        whiten = torch.linalg.solve_triangular(root, torch.eye(root.shape[-1]).to(root), upper=False)
        moved = torch.einsum("...kij,...kj->...ki", whiten, x.unsqueeze(-2) - self.loc)
        return moved.square().sum(-1) / self.stretch, 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def each_log_prob(self, x: Tensor) -> Tensor:
        """Log-densities of the components, weights included, shape ``(*batch, K)``."""
        n = x.shape[-1]
        if n == 0:
            return self.log_weights.expand((*joint_shape(x.shape[:-1], self.log_weights.shape[:-1]), -1))
        distance, log_det = self._standardized(x)
        whole = log_det + n * self.stretch.log()
        if self.df is None:
            each = -0.5 * (distance + whole + n * math.log(2 * math.pi))
        else:
            df = self.df
            norm = math.lgamma((df + n) / 2) - math.lgamma(df / 2) - n / 2 * math.log(df * math.pi)
            each = norm - 0.5 * whole - (df + n) / 2 * torch.log1p(distance / df)
        return self.log_weights + each

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, shape ``(*batch,)``."""
        return self.each_log_prob(x).logsumexp(-1)

    def given(self, known: Tensor, values: Tensor, rest: Tensor) -> Mixture:
        r"""The conditional of the places ``rest`` at ``values``, shape ``(*batch, len(known))``, of others.

        A t conditional has :math:`\nu + m` degrees of freedom, and its covariance grows by
        :math:`(\nu + d^2) / (\nu + m)` with the squared distance :math:`d^2` of the ``m`` values.
        """
        if not len(known):
            return self.at(rest)
        seen = self.at(known)
        each = seen.each_log_prob(values)
        across = self.cov.index_select(-2, rest).index_select(-1, known)
        gain = torch.linalg.solve(seen.cov, across.mT).mT
        moved = torch.einsum("...kij,...kj->...ki", gain, values.unsqueeze(-2) - seen.loc)
        cov = self.cov.index_select(-2, rest).index_select(-1, rest) - gain @ across.mT
        stretch, df = self.stretch.expand(each.shape), self.df
        if df is not None:
            stretch = stretch * (df + seen._standardized(values)[0]) / (df + len(known))
            df += len(known)
        return Mixture(each.log_softmax(-1), self.loc.index_select(-1, rest) + moved, (cov + cov.mT) / 2, df, stretch)

    def sample(self, sample_shape: Size) -> Tensor:
        """Draws, shape ``(*sample_shape, *batch, n)``."""
        which = Categorical(logits=self.log_weights, validate_args=False).sample(sample_shape)
        n = self.loc.shape[-1]
        # Each component draws by one product with its root, and the others' products are dropped.
        root = torch.linalg.cholesky(self.cov)
        noise = torch.randn((*which.shape, n), dtype=root.dtype, device=root.device)
        every = torch.einsum("...kij,...j->...ki", root, noise)
        loc = self.loc.expand(*which.shape, *self.loc.shape[-2:])
        index = which[..., None, None].expand(*which.shape, 1, n)
        size = self.stretch.expand(*which.shape, -1).gather(-1, which.unsqueeze(-1)).sqrt()
        if self.df is not None:
            squares = torch.randn(*which.shape, self.df, dtype=root.dtype, device=root.device).square().sum(-1)
            size = size * (self.df / squares).sqrt().unsqueeze(-1)
        return loc.gather(-2, index).squeeze(-2) + size * every.gather(-2, index).squeeze(-2)


def as_mixture(base: Distribution) -> Mixture | None:
    """A normal, or mixture of normals, over one flattened event, in float64; ``None`` for other distributions."""
    weights: Tensor | None = None
    inner: Any = base
    if isinstance(base, MixtureSameFamily):
        weights, inner = base.mixture_distribution.logits.log_softmax(-1), base.component_distribution
    event_dim = len(inner.event_shape)
    while isinstance(inner, Independent) or type(inner).__name__ == "ExpandedDistribution":
        inner = inner.base_dist
    if type(inner) in (Normal, dist.Normal):  # kinds of it may be no normals
        batch = base.batch_shape + (() if weights is None else weights.shape[-1:])
        loc, scale = (each.expand(batch + base.event_shape).flatten(-event_dim) for each in (inner.loc, inner.scale))
        cov = torch.diag_embed(scale.double().square())
    elif type(inner) in (MultivariateNormal, dist.MultivariateNormal) and event_dim == 1:
        loc, cov = inner.loc, inner.covariance_matrix.double()
    else:
        return None
    if weights is None:
        loc, cov, weights = loc.unsqueeze(-2), cov.unsqueeze(-3), loc.new_zeros(*loc.shape[:-1], 1)
    return Mixture(weights.double(), loc.double(), cov)


@torch.no_grad()
def fit_mixture(rows: Tensor, num_components: int, df: int, steps: int = 25) -> Mixture:
    r"""Fits a mixture of normals by expectation maximization, and returns it with t components in their place.

    A weak prior of :math:`n + 2` rows keeps covariances away from zero.

    Args:
        rows: shape ``(*batch, rows, n)``; each batch element has a mixture of its own.
        num_components: the number of components.
        df: degrees of freedom of the t components.
        steps: the number of iterations.

    References:
        Bayesian Regularization for Normal Mixture Estimation and Model-Based Clustering (Fraley & Raftery, 2007).
    """
    rows = rows.double()
    count, n = rows.shape[-2:]
    loc = rows.mean(-2, keepdim=True)
    centered = rows - loc
    cov = centered.mT @ centered / count
    least = CLOSE * cov.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).clamp(min=1e-300)
    root = torch.linalg.cholesky(cov + torch.diag_embed(least.expand(*least.shape[:-1], n)))
    x = torch.linalg.solve_triangular(root, centered.mT, upper=False).mT
    eye = torch.eye(n).to(x)
    scale = num_components ** (-2 / n)
    prior = (n + 2) * scale * eye
    centers = x[..., torch.randperm(count)[:num_components], :]
    log_weights = x.new_full((*x.shape[:-2], num_components), -math.log(num_components))
    made = Mixture(log_weights, centers, (scale * eye).expand(*centers.shape[:-1], n, n))
    for _ in range(steps if num_components > 1 else 1):
        spread = Mixture(made.log_weights.unsqueeze(-2), made.loc.unsqueeze(-3), made.cov.unsqueeze(-4))
        share = spread.each_log_prob(x).softmax(-1)  # (*batch, rows, K)
        total = share.sum(-2)
        middle = (share.mT @ x) / (total + 1e-9).unsqueeze(-1)
        second = torch.einsum("...rk,...ri,...rj->...kij", share, x, x)
        second = second - total[..., None, None] * middle.unsqueeze(-1) * middle.unsqueeze(-2)
        made = Mixture(
            ((total + 1) / (count + num_components)).log(),
            middle,
            (second + prior) / (total + n + 2)[..., None, None],
        )
    cov = torch.einsum("...ij,...kjl,...ml->...kim", root, made.cov, root)
    return Mixture(made.log_weights, loc + made.loc @ root.mT, (cov + cov.mT) / 2, df)
