"""Noise for dequantization."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, SigmoidTransform, constraints

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import event_size
from pyro_flows.core.recipes import remembered
from pyro_flows.distributions.flow import Flow, FlowDistribution
from pyro_flows.flows import realnvp
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.dense import MLP

__all__ = ["Dequantizer", "counted_uniform", "fresh_uniform", "from_uniform", "grid_bits"]

_WORD = 2**64
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def grid_bits(levels: int, dtype: torch.dtype) -> int:
    """The finest noise, in bits, whose sum with any level is exact in this dtype."""
    mantissa = -round(math.log2(torch.finfo(dtype).eps))
    # One bit is for midpoints.
    bits = mantissa - math.ceil(math.log2(levels))
    if bits < 4:
        raise ValueError(f"Dequantized: {dtype} is too coarse for noise within {levels} levels; use a wider dtype")
    return bits


def fresh_uniform(shape: Size | tuple[int, ...], bits: int, like: Tensor) -> Tensor:
    """Uniform noise from the global generator, at the midpoints of ``2 ** bits`` cells of (0, 1)."""
    drawn = torch.rand(shape, dtype=like.dtype, device=like.device)
    return ((drawn * 2.0**bits).floor() + 0.5) * 2.0**-bits


def counted_uniform(value: Tensor, event_dim: int, seed: int, draws: range, bits: int, dtype: torch.dtype) -> Tensor:
    """Noise that depends only on the seed, the numbers of the draws and the integers of a row.

    A hash of each row, 64-bit integers ``(*batch, *event)``, keys a stream of pseudo-random integers (SplitMix64).  So
    noise, ``(len(draws), *batch, *event)``, is the same on every device and in every batch, equal for equal rows and
    practically independent otherwise.  It costs some twenty integer operations a number.
    """
    flat = value.flatten(-event_dim)
    places = torch.arange(1, flat.shape[-1] + 1, device=value.device) * _signed(_STEP)
    row = _mixed(flat + places).sum(-1, keepdim=True)
    numbers = torch.tensor(draws, device=value.device) * _signed(_STEP)
    keys = _mixed(_mixed(torch.tensor(_signed(seed), device=value.device)) + numbers)
    start = _mixed(row + keys.view(-1, *(1 for _ in row.shape)))
    counts = (_mixed(start + places) >> (64 - bits)) & (2**bits - 1)
    return ((counts.to(dtype) + 0.5) * 2.0**-bits).view(len(draws), *value.shape)


def _signed(number: int) -> int:
    number %= _WORD
    return number - _WORD if number >= _WORD // 2 else number


def _mixed(state: Tensor) -> Tensor:
    """SplitMix64's output function; products wrap, masks make shifts logical."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _signed(_FIRST)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _signed(_SECOND)
    return state ^ ((state >> 31) & (2**33 - 1))


class _Logistic(dist.Logistic):
    """Standard logistic noise, finite even at a uniform 0."""

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        drawn = self.loc.new_empty(self._extended_shape(Size(sample_shape))).uniform_()
        return self.icdf(drawn.clamp(min=torch.finfo(drawn.dtype).eps / 2))


@remembered
class Dequantizer(nn.Module):
    r"""Noise from a flow that sees the pixels, :math:`q(u \mid n)` over :math:`(0, 1)^D`.

    A call with pixels returns the flow's distribution at the encoder's context :math:`e(n)`.  The default flow consists
    of affine couplings that end in a sigmoid, over a logistic base, and starts exactly uniform; the default encoder is
    dense, so large images need another.  A draw with its density costs one pass of the encoder and one of the flow in
    the sampling direction.

    Args:
        event_shape: shape of one image.
        flow: a :class:`~pyro_flows.distributions.flow.Flow` with this ``context_dim`` onto numbers between 0 and 1,
            cheap in the sampling direction.
        encoder: a module from pixels scaled to (-1, 1), shape ``(rows, *event_shape)``, to ``(rows, context_dim)``.
        context_dim: size of the encoder's output.
        num_layers: number of couplings of the default flow.
        hidden_dims: widths of the default networks.
        activation: their activation.

    Raises:
        ValueError: for a flow with another event shape or context, or values outside (0, 1).

    Example:
        >>> chain = pf.Chain([*pf.realnvp(4), pf.LogitPixels(4, levels=16)])
        >>> noise = pf.distributions.Dequantizer(4)
        >>> model = pf.Dequantized(pf.Flow(chain), levels=16, dequantizer=noise)
        >>> model.log_prob(model.sample((5,))).shape
        torch.Size([5])

    References:
        Flow++ (Ho et al., 2019), section 3.1, arXiv:1902.00275.
    """

    def __init__(
        self,
        event_shape: int | Iterable[int],
        *,
        flow: Flow | None = None,
        encoder: nn.Module | None = None,
        context_dim: int = 32,
        num_layers: int = 4,
        hidden_dims: Sequence[int] = (64,),
        activation: Activation = "silu",
    ) -> None:
        super().__init__()
        self.event_shape = event_size(event_shape)
        if flow is None:
            couplings = realnvp(
                self.event_shape,
                context_dim=context_dim,
                num_layers=num_layers,
                hidden_dims=hidden_dims,
                activation=activation,
            )
            ends = torch.zeros(self.event_shape), torch.ones(self.event_shape)
            logistic = _Logistic(*ends, validate_args=False)
            flow = Flow(Chain([*couplings, SigmoidTransform()]), logistic.to_event(len(self.event_shape)))
        if flow.event_shape != self.event_shape or flow.context_dim != context_dim:
            raise ValueError(
                f"Dequantizer: expected a flow of event shape {tuple(self.event_shape)} with context_dim={context_dim}"
                f", got event shape {tuple(flow.event_shape)} with context_dim={flow.context_dim}"
            )
        reached = flow.chain.codomain
        outside = [torch.full(self.event_shape, end, device="cpu") for end in (-0.5, 1.5)]
        if not constraints.is_dependent(reached) and any(map(reached.check, outside)):
            raise ValueError(
                f"Dequantizer: expected a flow onto numbers between 0 and 1, got one onto {reached}; end its chain in "
                "SigmoidTransform()"
            )
        self.flow = flow
        if encoder is None:
            size = self.event_shape.numel()
            net = MLP(size, context_dim, hidden_dims=hidden_dims, activation=activation, zero_init=False)
            encoder = nn.Sequential(OrderedDict(flat=nn.Flatten(), net=net, back=nn.Flatten()))
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> FlowDistribution:
        """The distribution of noise at pixels scaled to (-1, 1), shape ``(*batch, *event_shape)``."""
        batch = pixels.shape[: pixels.dim() - len(self.event_shape)]
        context = self.encoder(pixels.reshape(batch.numel(), *self.event_shape))
        return self.flow(context.reshape(*batch, context.shape[-1]))


def from_uniform(q: FlowDistribution, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Maps uniform noise to draws of the same shape, with their log-densities."""
    return q.from_base(_univariate(q.base_dist).icdf(uniform))


def _univariate(base: Distribution) -> Distribution:
    inner = base
    while isinstance(inner, Independent):
        inner = inner.base_dist
    if inner.event_shape or type(inner).icdf is Distribution.icdf:
        raise TypeError(
            "Dequantizer: noise that is the same each time wants a base of independent dimensions with icdf, such as "
            f"Normal or Logistic, got {type(inner).__name__}"
        )
    return inner
