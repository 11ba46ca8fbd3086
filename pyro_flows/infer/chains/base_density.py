"""A posterior in the base of a flow."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.machine.graph import Replay, replayable, unrecorded
from pyro_flows.infer.models.recorded import value_and_slope
from pyro_flows.infer.search.climb import LogDensity, SafeDensity

__all__ = ["BaseDensity"]


class BaseDensity:
    r"""The log-density of :math:`u` if :math:`z = T(u)` follows a given one, with its gradient.

    :math:`\log \pi(u) = \log p(T(u)) + \log|\det \partial T / \partial u|`, in nats: near the base's own density where
    the flow is near :math:`p`.  The gradient is that of the density at :math:`z`, pulled back through the chain by one
    backward pass, so a call costs one pass of the chain with its gradient, and one of the density.

    Args:
        flow: a flow without a context.
        density: an unnormalized log-density of draws, ``(S, D)`` to ``(S,)``; or a
            ``SafeDensity`` of it, which never raises and keeps to a time.

    Example:
        >>> posterior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> density = pf.infer.chains.BaseDensity(pf.Flow(pf.iaf(2)), posterior.log_prob)
        >>> values, gradients = density(torch.randn(5, 2))
        >>> values.shape, gradients.shape
        (torch.Size([5]), torch.Size([5, 2]))
    """

    def __init__(self, flow: Flow, density: LogDensity | SafeDensity) -> None:
        self.flow, self.density = flow, density
        self._replay = Replay(self._pulled, list(flow.parameters()), replayable(flow))

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-densities ``(S,)`` and gradients ``(S, D)`` at base-side points ``(S, D)``."""
        value, slope = cast(list[Tensor], self._replay(u.detach()))
        return value, slope

    def _pulled(self, u: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            u = u.requires_grad_()
            z, ladj = self.flow.chain.forward_and_ladj(u)
            log_p, pull = unrecorded(self._density, z.detach())
            # A sum, because gradients given to grad() make torch import its compiler.
            (slope,) = torch.autograd.grad((z * pull).sum() + ladj.sum(), u)
        return [log_p + ladj.detach(), slope]

    def _density(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.density, SafeDensity):
            log_p, pull = self.density.gradients(z)
        else:
            log_p, pull = value_and_slope(self.density, z)
        return log_p.to(z.device), pull.to(z)

    def log_weights(self, u: Tensor, values: Tensor) -> Tensor:
        """Returns the log-weights ``log p - log q`` ``(S,)`` at points whose log-densities here are known."""
        with torch.no_grad():
            return values - self.flow.base().log_prob(u)
