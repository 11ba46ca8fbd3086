"""Learned distributions over all whole numbers: the base of integer discrete flows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from pyro.distributions import constraints as pyro_constraints
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_flows.core.checks import WHOLE_BOUND, check_context, event_size, integer, wrong_event
from pyro_flows.core.modes import plain_eager
from pyro_flows.core.recipes import remembered
from pyro_flows.distributions.made.heads import LogisticMixtureHead
from pyro_flows.distributions.shared import SharedDistribution
from pyro_flows.nets.fixed_point import FixedPointNet
from pyro_flows.transforms import Squeeze

__all__ = ["IntegerLogistics", "IntegerLogisticsDistribution", "Logistics"]


class Logistics(NamedTuple):
    """Mixtures of logistics: logits, locations and log-scales in whole numbers, each of shape ``(*, K)``.

    Example:
        >>> zeros, loc = torch.zeros(1, 2), torch.tensor([[0.0, 5.0]])  # two components
        >>> law = pf.distributions.integers.Logistics(zeros, loc, zeros)
        >>> round(law.log_mass(torch.arange(-50.0, 50.0)).exp().sum().item(), 3)
        1.0
    """

    logits: Tensor
    loc: Tensor
    log_scale: Tensor

    def log_mass(self, value: Tensor) -> Tensor:
        """Log-masses of whole numbers, shape ``(*)``, in the dtype of the value, accurate far out in the tails."""
        logits, loc, log_scale = (each.to(value.dtype) for each in self)
        level, rate = value.unsqueeze(-1), torch.exp(-log_scale)
        # sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - e^(a - b)), without cancellation; b - a is the rate.
        upper = F.logsigmoid((level + 0.5 - loc) * rate)
        lower = F.logsigmoid((loc - (level - 0.5)) * rate)
        width = torch.log(-torch.expm1(-rate))
        return torch.logsumexp(torch.log_softmax(logits, -1) + upper + lower + width, -1)

    def below(self, value: Tensor) -> Tensor:
        """Probabilities of smaller numbers, shape ``(*)``."""
        inside = torch.sigmoid((value.unsqueeze(-1) - 0.5 - self.loc) * torch.exp(-self.log_scale))
        return (torch.softmax(self.logits, -1) * inside).sum(-1)

    def draw(self) -> Tensor:
        """Draws, shape ``(*)``, in float64."""
        noise = -torch.empty_like(self.logits).exponential_().log()
        chosen = (self.logits + noise).argmax(-1, keepdim=True)
        loc, scale = (each.gather(-1, chosen).squeeze(-1).double() for each in (self.loc, self.log_scale.exp()))
        uniform = torch.rand_like(loc).clamp(min=torch.finfo(torch.float64).tiny)
        return torch.floor(loc + scale * torch.logit(uniform) + 0.5).clamp(-WHOLE_BOUND, WHOLE_BOUND - 1)


class _Group(NamedTuple):
    """Numbers that are independent given others: places in the flat event, and the network's input, if any."""

    own: Tensor
    given: Tensor | None
    net: FixedPointNet | None


class IntegerLogisticsDistribution(SharedDistribution):
    """Whole numbers for ``pyro.sample``: made by :class:`IntegerLogistics`, whose parameters it shares.

    Example:
        >>> base = pf.distributions.IntegerLogistics(1, levels=10)
        >>> values = torch.arange(-200.0, 200.0).unsqueeze(-1)
        >>> round(base().log_prob(values).exp().sum().item(), 3)
        1.0
    """

    def _admit(self, value: Tensor) -> Tensor:
        cut = value.dim() - len(self.event_shape)
        if cut < 0 or value.shape[cut:] != self.event_shape:
            raise ValueError(wrong_event(self.model, value.shape, self.event_shape))
        if self._validate_args and value.numel() and plain_eager() and not value.is_meta:
            self._validate_sample(value)
        return value

    def _scores(self, value: Tensor) -> tuple[Tensor]:
        return (self.model.score(value, self.context),)

    def _draw(self, sample_shape: Size) -> Tensor:
        return self.model.draw(sample_shape + self.batch_shape, self.context)

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        raise NotImplementedError(
            "IntegerLogistics: whole numbers have no reparameterized draws; use sample() and a score-function estimator"
        )


@remembered
class IntegerLogistics(nn.Module):
    r"""Whole numbers from mixtures of logistics, cut at halves.

    .. math:: P(x_i = k) = \sum_j w_{ij} \left[\sigma\!\left(\frac{k + 1/2 - m_{ij}}{s_{ij}}\right)
        - \sigma\!\left(\frac{k - 1/2 - m_{ij}}{s_{ij}}\right)\right]

    Masses over all whole numbers add up to 1.  Each number has parameters of its own.  With a context, a
    :class:`~pyro_flows.nets.FixedPointNet` of it is added to them.

    With ``num_splits``, the numbers of an image are taken apart as those of an :func:`~pyro_flows.flows.idf` of as many
    splits: a squeeze, then half of the channels go on to the next scale, and the others are independent given these, by
    a network.  A density costs a pass of each network, a draw the same.

    Args:
        event_shape: an ``input_dim``, or the shape of one event.
        num_components: the number of logistics in a mixture (paper: 5 at the last scale, 1 for halves that leave).
        levels: the number of values that the numbers mostly have, from 0; the first locations spread over them.
        context_dim: size of the context, 0 for none.
        num_splits: splits of an image or a series.
        hidden_dims, kernel_size: of the networks, as in :class:`~pyro_flows.nets.FixedPointNet`.

    Raises:
        ValueError: for sizes out of range, or sides that cannot be halved that often.

    Example:
        >>> base = pf.distributions.IntegerLogistics(4, levels=10)
        >>> flow = pf.Flow(pf.idf(4, levels=10), base)
        >>> x = flow.sample((5,))
        >>> bool((x == x.round()).all())
        True

    References:
        Integer Discrete Flows and Lossless Compression (Hoogeboom et al., 2019), section 3.3, arXiv:1905.07376.
        Pixels by mixtures of logistics: PixelCNN++ (Salimans et al., 2017), arXiv:1701.05517.
    """

    def __init__(
        self,
        event_shape: int | Iterable[int],
        num_components: int = 3,
        *,
        levels: int = 256,
        context_dim: int = 0,
        num_splits: int = 0,
        hidden_dims: Sequence[int] = (32, 32),
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        self.event_shape = event_size(event_shape)
        self.context_dim = integer("IntegerLogistics", "context_dim", context_dim, 0)
        integer("IntegerLogistics", "num_splits", num_splits, 0)
        # The smallest scale is a thirty-second of a level.
        clip = max(7.0, math.log(16.0 * (levels - 1)))
        head = LogisticMixtureHead(levels, num_components, clip)
        self.head = cast(LogisticMixtureHead, head.bind(self.event_shape.numel()))
        self.bias = nn.Parameter(self.head.bias())
        self.nets = nn.ModuleList()
        places = torch.arange(self.event_shape.numel()).view(self.event_shape)
        found: list[tuple[Tensor, Tensor | None]] = []
        for _ in range(num_splits):
            squeeze = Squeeze(places.shape)
            halves = squeeze.inverse_and_ladj(places.double())[0].long().chunk(2)
            places = halves[0]
            found.append((halves[1], halves[0]))
        for own, given in [(places, None), *reversed(found)]:
            net = None
            if given is not None or context_dim:
                net = FixedPointNet(
                    0 if given is None else given.shape[0],
                    own.shape[0],
                    num_params=self.head.num_params,
                    space_dims=own.dim() - 1,
                    levels=levels,
                    hidden_dims=hidden_dims,
                    kernel_size=kernel_size,
                    context_dim=context_dim,
                )
            self.nets.append(nn.Identity() if net is None else net)
            self.register_buffer(f"own_{len(self.nets) - 1}", own, persistent=False)
            self.register_buffer(f"given_{len(self.nets) - 1}", given, persistent=False)

    @property
    def support(self) -> Constraint:
        """All whole numbers."""
        return constraints.independent(pyro_constraints.integer, len(self.event_shape))

    def _groups(self) -> Iterator[_Group]:
        for k, net in enumerate(self.nets):
            own, given = getattr(self, f"own_{k}"), getattr(self, f"given_{k}")
            yield _Group(own, given, net if isinstance(net, FixedPointNet) else None)

    def laws(self, value: Tensor, context: Tensor | None = None) -> Iterator[tuple[Tensor, Logistics]]:
        """Yields each group's places ``(n,)`` and its mixtures given those before, ``(rows or 1, n, K)``.

        Args:
            value: whole numbers, shape ``(rows, D)``; those of later groups are not read, and may be set in between.
            context: shape ``(rows, context_dim)``.
        """
        for own, given, net in self._groups():
            places = own.flatten()
            params = self.bias[places].unsqueeze(0)
            if net is not None:
                seen = value.new_zeros(len(value), 0, *own.shape[1:]) if given is None else value[:, given]
                params = params + net(seen, context).reshape(len(value), len(places), -1)
            yield places, Logistics(*self.head._parts(params))

    def score(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Log-mass in nats, of the batch shape; the context broadcasts to it."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        kind = value.dtype if value.is_floating_point() and value.dtype.itemsize >= 4 else torch.float64
        rows = value.to(kind).reshape(batch.numel(), self.event_shape.numel())
        laws = self.laws(rows, self._by_row(context, batch))
        return torch.stack([law.log_mass(rows[:, at]).sum(-1) for at, law in laws]).sum(0).view(batch)

    @torch.no_grad()
    def draw(self, batch: Size, context: Tensor | None) -> Tensor:
        """Draws, shape ``(*batch, *event_shape)``, in float64."""
        rows = self.bias.new_zeros(batch.numel(), self.event_shape.numel(), dtype=torch.float64)
        for at, law in self.laws(rows, self._by_row(context, batch)):
            rows[:, at] = Logistics(*(each.expand(len(rows), *each.shape[1:]) for each in law)).draw()
        return rows.view(*batch, *self.event_shape)

    def _by_row(self, context: Tensor | None, batch: Size) -> Tensor | None:
        if context is None:
            return None
        return context.expand(*batch, self.context_dim).reshape(batch.numel(), self.context_dim)

    @torch.no_grad()
    def fit_marginals(self, rows: Tensor) -> IntegerLogistics:
        """Sets the own parameters of each number to the marginal of the data; returns the base.

        Of a fresh flow, which is the identity, this is the best start.

        Args:
            rows: whole numbers, shape ``(N, *event_shape)``.
        """
        self.bias.copy_(self.head.bias(rows.reshape(len(rows), -1).to(self.bias)))
        return self

    def forward(self, context: Tensor | None = None) -> IntegerLogisticsDistribution:
        """The distribution, at a context of shape ``(*batch, context_dim)`` if it takes one."""
        check_context(self, context)
        return IntegerLogisticsDistribution(self, context)

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, num_components={self.head.num_components}, context_dim={self.context_dim}"
