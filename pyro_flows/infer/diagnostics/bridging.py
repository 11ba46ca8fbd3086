"""The evidence from draws of a guide and of the posterior together."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows.infer.diagnostics.weights import Importance

__all__ = ["bridged"]

ROUNDS = 100


def bridged(found: Importance, guide: Tensor, posterior: Tensor, effective: float) -> Importance:
    r"""Returns the guide's numbers with the evidence by bridge sampling.

    With log-weights :math:`\log w` of :math:`n` draws of the guide and of :math:`m` effective draws of the posterior,
    the evidence is the fixed point of

    .. math::
        Z = \frac{\operatorname{mean}_q\, w / (m w + n Z)}{\operatorname{mean}_p\, 1 / (m w + n Z)} .

    Its error is bounded where the weights of either alone have no variance.

    Args:
        found: the numbers of the guide's weights.
        guide: log-weights of its draws, ``(n,)``.
        posterior: those of draws of the posterior.
        effective: the effective number of these.

    Example:
        >>> from pyro_flows.infer.diagnostics.bridging import bridged
        >>> guide, posterior = torch.zeros(1000), torch.zeros(500)  # exact up to constants
        >>> found = pf.infer.diagnostics.importance(guide)
        >>> abs(bridged(found, guide, posterior, 500.0).log_evidence) < 1e-6
        True

    References:
        Meng, Wong: Simulating ratios of normalizing constants via a simple identity, 1996.
    """
    guide = guide.double().nan_to_num(nan=-math.inf, posinf=-math.inf)
    posterior = posterior.double()
    share = effective / (effective + len(guide))
    r = torch.tensor(found.log_evidence if math.isfinite(found.log_evidence) else float(posterior.median()))
    r = r.to(guide)
    for _ in range(ROUNDS):
        above = guide - _mixed(guide, r, share)
        below = -_mixed(posterior, r, share)
        new = above.logsumexp(0) - math.log(len(above)) - below.logsumexp(0) + math.log(len(below))
        if not new.isfinite():
            return found
        done, r = bool((new - r).abs() < 1e-8), new
        if done:
            break
    noise = _variance(above) / len(above) + _variance(below) / effective
    return replace(found, log_evidence=float(r), log_evidence_error=float(noise.sqrt()))


def _mixed(log_weights: Tensor, r: Tensor, share: float) -> Tensor:
    return torch.logaddexp(math.log(share) + log_weights, math.log1p(-share) + r)


def _variance(logs: Tensor) -> Tensor:
    """The squared coefficient of variation of exponentials."""
    value = (logs - logs.max()).exp()
    return value.var() / value.mean().square()
