"""Entropy and divergence by draws, with errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor, nn

from pyro_flows.core.checks import integer
from pyro_flows.distributions.queries.rough import Estimate

__all__ = ["estimate_entropy", "estimate_kl"]


def _distribution(p: Any) -> Any:
    """Returns what a module hands out, and distributions as they are."""
    return p() if isinstance(p, nn.Module) else p


def _drawn(p: Any, num_samples: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draws, their log-densities, and for a flow a number of known mean 0 that goes along with these."""
    shape = Size((num_samples,))
    if not hasattr(p, "from_base"):
        y = p.rsample(shape) if p.has_rsample else p.sample(shape)
        return y, p.log_prob(y), None
    base = p.base_dist
    x = base.rsample(shape) if base.has_rsample else base.sample(shape)
    y, score = p.from_base(x)
    try:
        return y, score, base.log_prob(x) + base.entropy()
    except NotImplementedError:
        return y, score, None


def _mean(numbers: Tensor, aside: Tensor | None) -> Estimate:
    """The mean over draws, less what ``aside``, of mean 0, explains of it."""
    count = len(numbers)
    if aside is not None:
        centered = aside.detach() - aside.detach().mean(0)
        slope = (centered * numbers.detach()).mean(0) / centered.square().mean(0).clamp(min=1e-30)
        slope = slope.clamp(-10.0, 10.0)  # of a uniform base's there is rounding alone
        numbers = numbers - slope * aside
    error = numbers.detach().std(0) / count**0.5
    return Estimate(numbers.mean(0), error, torch.full_like(error, count))


def estimate_entropy(p: Any, *, num_samples: int = 10_000) -> Estimate:
    r"""Estimates the entropy :math:`-E_p \log p` in nats from draws of ``p``, with its standard error.

    The log-density of a flow's base has a known mean, its negative entropy, and serves as a control variate: what
    it explains of the draws leaves the error.  For an affine flow of normals nothing is left.  Costs one pass for draws
    and densities; differentiable where draws are.

    Args:
        p: a distribution with ``log_prob`` and ``sample``: a flow's, a MADE's, an ensemble's, a marginal, Pyro's; or a
            module without a context that hands one out.
        num_samples: the number of draws.

    Example:
        >>> normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> value, error, effective = pf.distributions.estimate_entropy(normal)
        >>> bool((value - normal.entropy()).abs() < 5 * error)
        True
    """
    _, score, aside = _drawn(_distribution(p), integer("estimate_entropy", "num_samples", num_samples, 2))
    return _mean(-score, aside)


def estimate_kl(p: Any, q: Any, *, num_samples: int = 10_000) -> Estimate:
    r"""Estimates :math:`KL(p \| q) = E_p[\log p - \log q]` in nats from draws of ``p``, with its standard error.

    The control variate is that of :func:`estimate_entropy`.  An infinite divergence shows as a large error at best:
    where ``p`` has heavier tails than ``q``, few draws carry it.  Unlike ``torch.distributions.kl_divergence``, which
    promises a closed form and which Pyro's ``TraceMeanField_ELBO`` asks, this is an estimate, so it is not registered
    there.

    Args:
        p: a distribution with ``log_prob`` and ``sample``, or a module without a context that hands one out.
        q: one of the same events, with ``log_prob``; batches broadcast.
        num_samples: the number of draws.

    Raises:
        ValueError: for distributions of different events.

    Example:
        >>> p, q = dist.Normal(torch.tensor(0.0), 1.0), dist.Normal(torch.tensor(1.0), 1.0)
        >>> value, error, effective = pf.distributions.estimate_kl(p, q)
        >>> bool((value - 0.5).abs() < 5 * error)  # the true value is 1/2
        True
    """
    p, q = _distribution(p), _distribution(q)
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"estimate_kl: expected distributions of the same events, got event shapes {tuple(p.event_shape)} and "
            f"{tuple(q.event_shape)}"
        )
    y, score, aside = _drawn(p, integer("estimate_kl", "num_samples", num_samples, 2))
    return _mean(score - q.log_prob(y), aside)
