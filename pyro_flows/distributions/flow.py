"""``Flow``: the module that owns a base and a chain, and hands out the Pyro distribution of both."""

from __future__ import annotations

import math

import torch
from pyro.distributions import TransformedDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import check_tensor
from pyro_flows.core.modes import plain_eager
from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions.bases import DiagonalNormal, FixedBase, UniformCircle

__all__ = ["Flow", "FlowDistribution"]


class FlowDistribution(TransformedDistribution):
    """A ``TransformedDistribution`` over flows that scores in one pass, with or without a memo.

    Made by :class:`Flow`; a view that shares the flow's parameters.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, shape ``(*sample, *batch)``; one pass in the density direction."""
        (transform,) = self.transforms
        check_tensor("Flow", "a tensor", value)
        # Neither torch's check nor its Independent can take an empty batch, and a check branches on the data.
        if self._validate_args and value.numel() and plain_eager():
            self._validate_sample(value)
        x, ladj = transform.inverse_and_memo(value)
        if x.numel():
            return self.base_dist.log_prob(x) + ladj
        # Nothing, but a function of all parameters, as DistributedDataParallel wants where a process has no rows.
        return ladj + x.sum(tuple(range(-len(transform.event_shape), 0)))

    def rsample_and_log_prob(self, sample_shape: Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Reparameterised samples and their log-densities; one pass in the sampling direction."""
        (transform,) = self.transforms
        x = self.base_dist.rsample(Size(sample_shape))
        y, ladj = transform.forward_and_ladj(x)
        return y, self.base_dist.log_prob(x) - ladj if x.numel() else -ladj


class Flow(nn.Module):
    r"""A normalizing flow as a module: a base and a chain.

    The density is :math:`\log p(y) = \log b(x) - \log|\det \partial y / \partial x|` at :math:`x = f^{-1}(y)`.

    The module owns both, so ``parameters``, ``to``, ``state_dict``, ``requires_grad_`` and ``pyro.module`` reach
    everything.  Calling it gives a Pyro distribution that shares the parameters: ``pyro.sample("x", flow())``, or
    ``flow(context)`` if the chain takes a context, whose batch shape is then the distribution's.

    Args:
        chain: a chain or any other flow transform; several are put in a :class:`~pyro_flows.core.chain.Chain`.
        base: ``None`` for a standard normal on the chain's device, uniform in dimensions that are angles (see
            :func:`~pyro_flows.flows.ncsf`); a distribution, fixed, whose tensors move with the
            module; or an ``nn.Module`` that returns a distribution when called, whose parameters are then the flow's.

    Raises:
        ValueError: if the base's event shape is not the chain's, a fixed base has tensors that want a gradient, or the
            chain's angles have a base that is no density of angles.
    """

    def __init__(self, chain: FlowTransform | list[Transform], base: Distribution | nn.Module | None = None) -> None:
        super().__init__()
        self.chain = chain if isinstance(chain, FlowTransform) else Chain(chain)
        event, periodic = self.chain.event_shape, self.chain.periodic
        if base is None:
            base = DiagonalNormal(event) if periodic is None else UniformCircle(event, periodic)
            held = next((t for t in (*self.chain.parameters(), *self.chain.buffers()) if t.is_floating_point()), None)
            if held is not None:
                base.to(held.device, held.dtype)
        elif isinstance(base, Distribution):
            base = FixedBase(base)
        elif not isinstance(base, nn.Module):
            raise TypeError(f"Flow: expected base to be a distribution or a module, got {type(base).__name__}")
        self.base = base
        made = self.base()
        shape = made.batch_shape + made.event_shape
        if made.event_shape != event:
            hint = ": call .to_event() on it" if shape == event else ""
            raise ValueError(
                f"Flow: expected a base with event shape {tuple(event)}, got batch shape {tuple(made.batch_shape)} and "
                f"event shape {tuple(made.event_shape)}{hint}"
            )

        if periodic is not None:
            _refuse_line(made, periodic)

    @property
    def event_shape(self) -> Size:
        """Shape of one draw."""
        return self.chain.data_shape

    @property
    def context_dim(self) -> int:
        """Size of the context, 0 for none."""
        return self.chain.context_dim

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The distribution, at a context of shape ``(*batch, context_dim)`` if the chain takes one."""
        if context is None and self.chain.context_dim:
            raise ValueError(f"this flow was built with context_dim={self.chain.context_dim}: call flow(context)")
        chain = self.chain if context is None else self.chain.condition(context)
        return FlowDistribution(self.base(), [chain])

    condition = forward

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats, of the shape that value and context broadcast to."""
        return self(context).log_prob(value)

    def sample(self, sample_shape: Size | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Draws without gradient, shape ``(*sample_shape, *context_batch, *event_shape)``."""
        return self(context).sample(Size(sample_shape))

    def rsample(self, sample_shape: Size | tuple[int, ...] = (), context: Tensor | None = None) -> Tensor:
        """Reparameterised draws."""
        return self(context).rsample(Size(sample_shape))

    def rsample_and_log_prob(
        self, sample_shape: Size | tuple[int, ...] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reparameterised draws and their log-densities, in one pass."""
        return self(context).rsample_and_log_prob(Size(sample_shape))


@torch.no_grad()
def _refuse_line(base: Distribution, angles: Tensor) -> None:
    """Refuses a base whose density goes on beyond a turn and is another one there, so that a turn holds less than 1."""
    if angles.is_meta:
        return
    here = torch.full(angles.shape, 0.5, device=angles.device)
    try:
        change = base.log_prob(here + 2 * math.pi * angles) - base.log_prob(here)
    except ValueError:  # beyond its support
        return
    if (change.isfinite() & (change.abs() > 1e-3)).any():
        raise ValueError(
            "Flow: this chain takes angles modulo 2 pi, but the base gives another density at x + 2 pi than at x, so "
            "it would not integrate to 1 over a turn; leave base out, or take UniformCircle or Pyro's VonMises"
        )
