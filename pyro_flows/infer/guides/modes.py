"""The base of a guide that covers several modes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from pyro_flows.core.recipes import remembered
from pyro_flows.distributions import DiagonalNormal, Flow

__all__ = ["ModesBase", "base_draws", "with_base_of"]


class _Modes(dist.MixtureSameFamily):
    """Draws belong to a normal that weights pick, and follow the parameters of that normal, but not the weights."""

    has_rsample = True

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        weights = self.mixture_distribution.probs.detach().cumsum(-1)
        place = torch.rand((*sample_shape, 1), dtype=weights.dtype, device=weights.device)
        which = (place > weights[:-1]).sum(-1)[..., None, None]
        each = self.component_distribution.rsample(Size(sample_shape))
        return each.gather(-2, which.expand(*sample_shape, 1, each.shape[-1])).squeeze(-2)


@remembered
class ModesBase(nn.Module):
    r"""A mixture of normals, one for each mode of a posterior, :math:`\sum_k w_k N(\mu_k, S_k S_k^\top)`.

    Draws are reparameterized for what follows the base, since the normal that a draw belongs to does not depend on it.
    The weights :math:`w = \mathrm{softmax}(` ``logits`` :math:`)` learn through densities alone, as by a forward
    divergence; locations and scales are constant.

    Args:
        input_dim: the number of dimensions.
        num_modes: the number of normals.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, input_dim: int, num_modes: int) -> None:
        super().__init__()
        self.event_shape = Size((input_dim,))
        self.logits = nn.Parameter(torch.zeros(num_modes))
        self.register_buffer("loc", torch.zeros(num_modes, input_dim))
        self.register_buffer("scale", torch.eye(input_dim).repeat(num_modes, 1, 1))

    @torch.no_grad()
    def place(self, loc: Tensor, scale: Tensor, share: Tensor) -> ModesBase:
        """Sets locations ``(K, D)``, triangular scales ``(K, D, D)`` and weights ``(K,)``."""
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        self.logits.copy_(share.log())
        return self

    def forward(self, widening: float = 1.0) -> dist.Distribution:
        """The distribution, event shape ``(input_dim,)``; with its normals so much wider."""
        normals = dist.MultivariateNormal(self.loc, scale_tril=self.scale * widening, validate_args=False)
        return _Modes(dist.Categorical(logits=self.logits, validate_args=False), normals, validate_args=False)

    def extra_repr(self) -> str:
        return f"{self.event_shape[0]}, {len(self.logits)} modes"


def base_draws(flow: Flow, count: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draws ``(count, D)`` of a base so much wider, around each of its modes, and their log-densities."""
    if isinstance(flow.base, ModesBase):
        base = flow.base(scale)
        draws = base.sample((count,))
        return draws, base.log_prob(draws)
    base = flow.base()
    draws = base.sample((count,))
    return draws * scale, base.log_prob(draws) - draws.shape[-1] * math.log(scale)


def with_base_of(state: Mapping[str, Tensor], place: str, flow: Flow) -> Flow:
    """Returns a guide's flow with a base like that of another, in whose state the base's parts begin so."""
    logits = state.get(f"{place}logits")
    base = flow.base
    if logits is None and isinstance(base, ModesBase):
        base = DiagonalNormal(flow.event_shape)
    elif logits is not None and not (isinstance(base, ModesBase) and base.logits.shape == logits.shape):
        base = ModesBase(flow.event_shape[0], len(logits))
    if base is flow.base:
        return flow
    kin = next(flow.parameters())
    return Flow(flow.chain, base.to(kin.device, kin.dtype)).train(flow.training)
