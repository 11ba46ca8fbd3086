"""Distribution functions and quantiles of densities on the line, through one monotone map."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions import StudentT as PyroStudentT
from torch import Tensor
from torch.distributions import Distribution, Independent, StudentT

from pyro_flows.core.chain import leaves
from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions.queries.mixtures import Mixture, as_mixture

__all__ = ["Line", "mean_of_affine", "root"]

_NODES, _REACH = 2048, 4.0  # of the quadrature of a mean
_TERMS, _ROUNDING = 300, 1e-15  # of a continued fraction
_SETTLED = 1e-3


class Line:
    """A base on the line and a monotone map of it; values and probabilities have the shape of a batch.

    Args:
        base: a normal, a mixture of normals, Student's t, or another distribution with a ``cdf``.
        chain: the map, of events of one number.

    Raises:
        NotImplementedError: for events of several numbers, whole numbers, angles, and other bases.
    """

    def __init__(self, base: Distribution, chain: FlowTransform) -> None:
        if chain.data_shape.numel() != 1 or chain.event_shape.numel() != 1:
            raise NotImplementedError(
                f"cdf, icdf and mean are known of densities of one number, and this flow has events of shape "
                f"{tuple(chain.data_shape)}; count among draws, e.g. torch.quantile(d.sample((100_000,)), 0.9, 0) (the "
                "result of fit_density has fit.quantile(q) and fit.interval()), or ask d.marginal(k)"
            )
        if chain.discrete or chain.periodic is not None:
            kind = "whole numbers" if chain.discrete else "angles, which have no least one"
            raise NotImplementedError(f"cdf, icdf and mean: this is a density of {kind}; count among draws")
        self.base, self.chain = base, chain
        self.law = _law_of(base, len(chain.event_shape))

    @functools.cached_property
    def falls(self) -> Tensor:
        """Whether the map is decreasing, shape of the batch."""
        law = self.law
        with torch.no_grad():
            if law.loc is None or law.scale is None:
                points = [law.icdf(law.like.new_tensor(p)) for p in (0.1, 0.9)]
            else:
                points = [law.loc - law.scale, law.loc + law.scale]
            low, high = (self._up(x.to(law.like.dtype)) for x in points)
        return high < low

    def _up(self, x: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(x.shape, self.chain.batch_shape)
        value = self.chain(x.expand(batch).reshape(batch + self.chain.event_shape))
        return value.flatten(-len(self.chain.data_shape)).squeeze(-1)

    def cdf(self, value: Tensor) -> Tensor:
        """The probability of at most a value, which has the event's shape behind the batch."""
        x = self.chain.inverse_and_memo(value)[0]
        below, above = self.law.cdf(x.flatten(-len(self.chain.event_shape)).squeeze(-1))
        return torch.where(self.falls, above, below).to(value.dtype)

    def icdf(self, probability: Tensor) -> Tensor:
        """The value below which a probability lies, of the probability's batch shape."""
        sides = [self.law.icdf(probability, upper) for upper in (False, True) if (self.falls == upper).any()]
        x = sides[0] if len(sides) == 1 else torch.where(self.falls, sides[1], sides[0])
        return self._up(x.to(self.law.like.dtype))

    def mean(self) -> Tensor:
        """The mean by a double exponential quadrature, shape of the batch.

        Raises:
            NotImplementedError: if the integral does not settle, or the base is of another kind.
        """
        steps = torch.arange(-_NODES // 2, _NODES // 2 + 1, dtype=torch.float64, device=self.law.like.device)
        t = steps * (2 * _REACH / _NODES)
        inner = math.pi / 2 * t.sinh()
        x, slope = inner.sinh(), math.pi / 2 * t.cosh() * inner.cosh()
        batch = torch.broadcast_shapes(self.base.batch_shape, self.chain.batch_shape)
        x, slope = (each.view(-1, *(1 for _ in batch)) for each in (x, slope))
        x, weights = self.law.weighted(x, slope * (2 * _REACH / _NODES))
        values = self._up(x.to(self.law.like.dtype)).double()
        parts = torch.where(weights == 0, 0.0, weights * values)
        whole, size = parts.sum(0), parts.abs().sum(0)
        if not whole.isfinite().all():
            return whole.to(self.law.like.dtype)
        margin = len(parts) // 16
        outer = (parts[:margin].abs().sum(0) + parts[-margin:].abs().sum(0)) / size
        halved = (2 * parts[::2].sum(0) - whole).abs() / size
        if (torch.maximum(outer, halved) > _SETTLED).any():
            raise NotImplementedError(
                "mean: the tails are so heavy that its integral does not settle; take the median, icdf(0.5), or the "
                "mean of draws"
            )
        return whole.to(self.law.like.dtype)


def mean_of_affine(base: Distribution, chain: FlowTransform) -> Tensor | None:
    """The image of the base's mean under affine layers, shape ``(*batch, *event)``; ``None`` for other flows."""
    if not all(leaf.affine or getattr(getattr(leaf, "transform", None), "affine", False) for leaf in leaves(chain)):
        return None
    try:
        mean = base.mean
    except NotImplementedError:
        return None
    batch = torch.broadcast_shapes(base.batch_shape, chain.batch_shape)
    return chain(mean.expand(batch + chain.event_shape))


# Bases.


@dataclass
class _Law:
    """The distribution of the base: probabilities below and above a value, log-density, and what else is known.

    ``quantile`` returns the value with a probability below it, or above it; ``loc`` and ``scale`` say where most of it
    lies, and ``like`` is a tensor of its dtype.
    """

    cdf: Callable[[Tensor], tuple[Tensor, Tensor]]
    score: Callable[[Tensor], Tensor]
    like: Tensor
    quantile: Callable[[Tensor, bool], Tensor] | None = None
    loc: Tensor | None = None
    scale: Tensor | None = None

    def icdf(self, probability: Tensor, upper: bool = False) -> Tensor:
        """The value with a probability below it, or above it."""
        known = self.quantile
        return root(self.cdf, self.score, probability, upper) if known is None else known(probability, upper)

    def weighted(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes in the units of the base, and their weights."""
        if self.loc is None or self.scale is None:
            raise NotImplementedError("mean: that of this base is not known; take the mean of draws")
        x = self.loc + self.scale * x
        return x, self.score(x).exp() * self.scale * step


def _law_of(base: Distribution, event_dim: int) -> _Law:
    normals = as_mixture(base)
    if normals is not None:
        return _normals(normals, base)
    inner: Any = base
    while isinstance(inner, Independent) or type(inner).__name__ == "ExpandedDistribution":
        inner = inner.base_dist
    name = type(inner).__name__
    if inner.event_shape:
        raise NotImplementedError(f"cdf, icdf and mean: this base, {name}, has none; count among draws")

    def bare(value: Tensor) -> Tensor:
        return value.flatten(-event_dim).squeeze(-1)

    def ask(what: str, x: Tensor) -> Tensor:
        try:
            return bare(getattr(inner, what)(x.reshape(x.shape + (1,) * event_dim).to(like.dtype)))
        except NotImplementedError as error:
            raise NotImplementedError(
                f"cdf, icdf and mean: this base, {name}, has no {what}; count among draws"
            ) from error

    like = next((each for each in vars(inner).values() if isinstance(each, Tensor)), torch.zeros(()))
    if type(inner) not in (StudentT, PyroStudentT):

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            below = ask("cdf", x)
            return below, 1 - below

        return _Law(both, partial(ask, "log_prob"), like, lambda p, upper: ask("icdf", 1 - p if upper else p))
    df, loc, scale = (bare(each).double() for each in torch.broadcast_tensors(inner.df, inner.loc, inner.scale))

    def tails(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x.double() - loc) / scale
        tail = 0.5 * _beta_fraction(df / 2, torch.full_like(df, 0.5), df / (df + z * z), z * z / (df + z * z))
        return torch.where(z > 0, 1 - tail, tail), torch.where(z > 0, tail, 1 - tail)

    double = StudentT(df, loc, scale, validate_args=False)
    return _Law(tails, lambda x: double.log_prob(x.double()), like, loc=loc, scale=scale)


def _normals(normals: Mixture, base: Distribution) -> _Law:
    weights, loc, scale = normals.log_weights.exp(), normals.loc[..., 0], normals.cov[..., 0, 0].sqrt()

    def cdf(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x.double().unsqueeze(-1) - loc) / scale
        return (weights * torch.special.ndtr(z)).sum(-1), (weights * torch.special.ndtr(-z)).sum(-1)

    def of_one(probability: Tensor, upper: bool) -> Tensor:
        z = torch.special.ndtri(probability.double())
        return loc[..., 0] + scale[..., 0] * (-z if upper else z)

    inner: Any = getattr(base, "component_distribution", base)
    while not hasattr(inner, "loc"):
        inner = inner.base_dist
    middle = (weights * loc).sum(-1)
    spread = (weights * (scale.square() + loc.square())).sum(-1) - middle.square()
    return _Law(
        cdf,
        lambda x: normals.log_prob(x.double().unsqueeze(-1)),
        inner.loc,
        of_one if loc.shape[-1] == 1 else None,
        middle,
        spread.sqrt(),
    )


def _beta_fraction(a: Tensor, b: Tensor, x: Tensor, rest: Tensor) -> Tensor:
    r"""The regularized incomplete beta function :math:`I_x(a, b)`, with ``rest`` :math:`1 - x`, in float64.

    References:
        Lentz's evaluation of the continued fraction: Numerical Recipes (Press et al., 2007), section 6.4.
    """
    swap = x > (a + 1) / (a + b + 2)
    a, b = torch.where(swap, b, a), torch.where(swap, a, b)
    x, rest = torch.where(swap, rest, x), torch.where(swap, x, rest)
    tiny = 1e-300
    inside = (x > 0) & (rest > 0)
    x, rest = torch.where(inside, x, 0.5), torch.where(inside, rest, 0.5)
    front = (a * x.log() + b * rest.log() + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)).exp() / a
    c = torch.ones_like(x)
    d = 1 / (1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, _TERMS):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + step * d + tiny)
            c = 1 + step / (c + tiny)
            total = total * d * c
        if ((d * c - 1).abs() < _ROUNDING).all():
            break
    found = torch.where(inside, front * total, 0.0)
    return torch.where(swap, 1 - found, found)


def root(
    cdf: Callable[[Tensor], tuple[Tensor, Tensor]],
    score: Callable[[Tensor], Tensor],
    probability: Tensor,
    upper: bool = False,
    between: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The value with a probability below it (or above it), by bisection to rounding; differentiable.

    ``cdf`` returns the probabilities below and above a value, and ``score`` its log-density.  The value lies
    ``between`` two, if they are known; without them, all of the line must have a probability.
    """
    aim = probability.detach().double()
    side = 1 if upper else 0
    with torch.no_grad():
        known = ~(cdf(torch.zeros_like(aim))[0] if between is None else between[0] + between[1]).isnan()
        aim = aim.expand(torch.broadcast_shapes(aim.shape, known.shape))
        inner = (aim > 0) & (aim < 1) & known
        sought = torch.where(inner, aim, 0.5)

        def low(x: Tensor) -> Tensor:  # whether x lies below the root
            found = cdf(x)[side]
            return torch.where(inner, found > sought if upper else found < sought, x < 0)

        left, right = -torch.ones_like(sought), torch.ones_like(sought)
        if between is not None:
            left, right = (
                torch.where(inner, each.double(), end) for each, end in zip(between, (left, right), strict=True)
            )
        else:
            while (more := ~low(left)).any() and left.min() > -1e300:
                left = torch.where(more, 2 * left, left)
            while (more := low(right)).any() and right.max() < 1e300:
                right = torch.where(more, 2 * right, right)
        for _ in range(200):
            middle = left / 2 + right / 2
            below = low(middle)
            if ((middle == left) | (middle == right)).all():
                break
            left, right = torch.where(below, middle, left), torch.where(below, right, middle)
        x = left / 2 + right / 2
    if torch.is_grad_enabled():
        # The implicit function's gradient: a step of Newton's method that moves by nothing.
        gap = cdf(x)[side] - probability.double()
        step = (gap - gap.detach()) / score(x).detach().exp().double()
        x = x + step if upper else x - step
    end = torch.where((aim == 0) == upper, math.inf, -math.inf)
    if between is not None:
        end = torch.where((aim == 0) == upper, between[1].double(), between[0].double())
    return torch.where(inner, x, torch.where(known, end, math.nan))
