"""Noise for dequantization: uniform, reproducible by what a row holds, or from a flow conditioned on the pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, SigmoidTransform, constraints

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import event_size
from pyro_flows.distributions.flow import Flow, FlowDistribution
from pyro_flows.flows import realnvp
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.dense import MLP

__all__ = ["Dequantizer", "counted_uniform", "fresh_uniform", "from_uniform", "grid_bits"]

_WORD = 2**64
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def grid_bits(levels: int, dtype: torch.dtype) -> int:
    """How fine noise can be, in bits, for its sum with any level to be exact in this dtype."""
    mantissa = -round(math.log2(torch.finfo(dtype).eps))
    # One bit is for midpoints, which are never 0 or 1.
    bits = mantissa - math.ceil(math.log2(levels))
    if bits < 4:
        raise ValueError(f"Dequantized: {dtype} is too coarse for noise within {levels} levels; use a wider dtype")
    return bits


def fresh_uniform(shape: Size | tuple[int, ...], bits: int, like: Tensor) -> Tensor:
    """Uniform noise from the global generator, at the midpoints of ``2 ** bits`` cells of (0, 1)."""
    drawn = torch.rand(shape, dtype=like.dtype, device=like.device)
    return ((drawn * 2.0**bits).floor() + 0.5) * 2.0**-bits


def counted_uniform(value: Tensor, event_dim: int, seed: int, draws: range, bits: int, dtype: torch.dtype) -> Tensor:
    """Noise that is a function of the seed, the draw and all whole numbers of its row, and of nothing else.

    Each row keys a stream of pseudo-random integers (SplitMix64) by a hash of its content.  So noise is the same on
    every device, in whatever batch a row comes; as good as independent between rows that differ, and equal for equal
    rows.  Some twenty integer operations a number.

    Args:
        value: integers of 64 bits, shape ``(*batch, *event)``.
        event_dim: the number of event dimensions.
        seed: any integer.
        draws: the numbers of the draws.
        bits: of the midpoints, as in :func:`fresh_uniform`.
        dtype: of the noise.

    Returns:
        Shape ``(len(draws), *batch, *event)``.
    """
    flat = value.flatten(-event_dim)
    places = torch.arange(1, flat.shape[-1] + 1, device=value.device) * _signed(_STEP)
    row = _mixed(flat + places).sum(-1, keepdim=True)
    keys = [_signed(_number(_number(seed) + draw * _STEP)) for draw in draws]
    start = _mixed(row + torch.tensor(keys, device=value.device).view(-1, *(1 for _ in row.shape)))
    counts = (_mixed(start + places) >> (64 - bits)) & (2**bits - 1)
    return ((counts.to(dtype) + 0.5) * 2.0**-bits).view(len(draws), *value.shape)


def _signed(number: int) -> int:
    number %= _WORD
    return number - _WORD if number >= _WORD // 2 else number


def _mixed(state: Tensor) -> Tensor:
    """The output function of SplitMix64; products wrap, and masks make shifts logical."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _signed(_FIRST)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _signed(_SECOND)
    return state ^ ((state >> 31) & (2**33 - 1))


def _number(state: int) -> int:
    """The same of one number."""
    state %= _WORD
    state = (state ^ (state >> 30)) * _FIRST % _WORD
    state = (state ^ (state >> 27)) * _SECOND % _WORD
    return state ^ (state >> 31)


class _Logistic(dist.Logistic):
    """Standard logistic noise without the infinity that a uniform number of exactly 0 would give."""

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        drawn = self.loc.new_empty(self._extended_shape(Size(sample_shape))).uniform_()
        return self.icdf(drawn.clamp(min=torch.finfo(drawn.dtype).eps / 2))


class Dequantizer(nn.Module):
    r"""Noise within pixels by a flow that sees them, :math:`q(u \mid n)` over :math:`(0, 1)^D`.

    Calling it with pixels gives a distribution of noise: the flow's at the context :math:`e(n)`, where :math:`e` is the
    encoder.  By default the flow consists of affine couplings that end in a sigmoid, with a logistic base, so that a
    fresh one is exactly uniform; and the encoder is a dense network.  Large images want an encoder of their own.
    A draw with its density costs one pass of the encoder and one of the flow in the sampling direction.

    Args:
        event_shape: shape of one image.
        flow: a :class:`~pyro_flows.distributions.flow.Flow` with this ``context_dim`` onto numbers
            between 0 and 1, cheap in the sampling direction; ``None`` for the default.
        encoder: a module from pixels scaled to (-1, 1), shape ``(rows, *event_shape)``, to ``(rows, context_dim)``;
            ``None`` for the default.
        context_dim: size of what the encoder makes of an image, the context of the flow.
        num_layers: number of couplings of the default flow.
        hidden_dims: widths of the hidden layers of couplings and encoder, where those are the default ones.
        activation: of these networks.

    Raises:
        ValueError: for a flow that has another event shape, takes another context, or gives numbers beyond (0, 1).

    References:
        Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture Design (Ho et
        al., 2019), section 3.1, arXiv:1902.00275.
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
        if not constraints.is_dependent(reached):
            outside = [bool(reached.check(torch.full(self.event_shape, end, device="cpu"))) for end in (-0.5, 1.5)]
            if any(outside):
                raise ValueError(
                    f"Dequantizer: expected a flow onto numbers between 0 and 1, got one onto {reached}; end its chain "
                    "in SigmoidTransform()"
                )
        self.flow = flow
        if encoder is None:
            encoder = _Dense(self.event_shape, context_dim, hidden_dims, activation)
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> FlowDistribution:
        """The distribution of noise at pixels scaled to (-1, 1), shape ``(*batch, *event_shape)``."""
        batch = pixels.shape[: pixels.dim() - len(self.event_shape)]
        context = self.encoder(pixels.reshape(batch.numel(), *self.event_shape))
        return self.flow(context.reshape(*batch, context.shape[-1]))


class _Dense(nn.Module):
    """A dense network of flattened images."""

    def __init__(self, event_shape: Size, context_dim: int, hidden_dims: Sequence[int], activation: Activation) -> None:
        super().__init__()
        size = event_shape.numel()
        self.net = MLP(size, context_dim, hidden_dims=hidden_dims, activation=activation, zero_init=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels.flatten(1)).squeeze(-1)


def from_uniform(q: FlowDistribution, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws that are a function of uniform noise of their shape, and their log-densities."""
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
