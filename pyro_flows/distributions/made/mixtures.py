"""Heads whose conditionals are mixtures, of normals or of discretised logistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyro_flows.distributions.made.contract import Head
from pyro_flows.distributions.made.heads import choose, choosing, soft_unclip, spoiling
from pyro_flows.univariate.base import number, soft_clip

__all__ = ["LogisticMixtureHead", "MixtureHead"]


def _count(name: str, value: int, what: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected {what} to be an integer >= {least}, got {value!r}")
    return value


def _middles(count: int, like: Tensor) -> Tensor:
    """The middles of so many equal parts of (0, 1)."""
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count


def _quantiles(data: Tensor, count: int) -> Tensor:
    """At the middles of so many equal parts, shape ``(D, count)``."""
    places = _middles(count, data.new_zeros((), dtype=torch.double)) * (len(data) - 1)
    return data.sort(0).values[places.round().long()].T


def _pick(logits: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Of each part the entry of one component, drawn by the logits."""
    index, none = choose(logits, torch.rand_like(logits[..., 0]))
    return tuple(part.gather(-1, index.unsqueeze(-1)).squeeze(-1) + none for part in parts)


def _picking(
    count: int, bound: float, z: Tensor, params: Tensor, x: Tensor
) -> tuple[list[Callable[[], object]], Tensor]:
    """Calls that draw a component, in place, with its mean to ``x``; and where they leave its scale."""
    logits, loc, raw = params.unflatten(1, (3, count)).unbind(1)
    room, code, scale = torch.empty_like(logits), torch.empty_like(logits), torch.empty_like(x)
    calls: list[Callable[[], object]] = [
        *choosing(logits, z, room, code),
        partial(torch.mul, code, raw, out=room),
        partial(torch.sum, room, 1, out=scale),
        partial(scale.mul_, number(1.0 / bound, x.dtype)),
        scale.tanh_,
        partial(scale.mul_, number(bound, x.dtype)),
        scale.exp_,
        partial(torch.mul, code, loc, out=room),
        partial(torch.sum, room, 1, out=x),
        spoiling(x, z),
    ]
    return calls, scale


class MixtureHead(Head):
    r"""Real values from a mixture of normals, :math:`p(x) = \sum_j w_j N(x; m_j, e^{2 s_j})`.

    The parameters are, for all :math:`K` components one after the other, logits of :math:`w`, means :math:`m` and
    :math:`a` with :math:`s = c \tanh(a / c)`.  ``bias()`` spreads the means over the quantiles of a standard normal,
    ``bias(data)`` over those of the data; the scales are such that the variance is that of the whole.  With a MADE
    this is the MADE-MoG.  A draw costs as much as one of a normal; there are no reparameterised ones.

    Args:
        num_components: :math:`K`.
        max_log_scale: the bound :math:`c` on the absolute log-scale; data of another scale is to be standardised.

    References:
        RNADE: The real-valued neural autoregressive density-estimator (Uria et al., 2013), arXiv:1306.0186.
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057.
    """

    discrete = False
    constraint = constraints.real

    def __init__(self, num_components: int = 10, max_log_scale: float = 5.0) -> None:
        super().__init__()
        self.num_components = _count("MixtureHead", num_components, "num_components", 1)
        if not 0 < max_log_scale < math.inf:
            raise ValueError(f"MixtureHead: expected max_log_scale > 0, got {max_log_scale}")
        self.max_log_scale = float(max_log_scale)
        self.num_params = 3 * num_components

    def _parts(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, loc, raw = params.unflatten(-1, (3, self.num_components)).unbind(-2)
        return logits, loc, soft_clip(raw, self.max_log_scale)

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        logits, loc, log_scale = self._parts(params)
        z = (value.to(params.dtype).unsqueeze(-1) - loc) * torch.exp(-log_scale)
        joint = torch.log_softmax(logits, -1) - 0.5 * z * z - log_scale
        return torch.logsumexp(joint, -1) - 0.5 * math.log(2 * math.pi)

    def sample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            loc, log_scale = _pick(*self._parts(params))
            return torch.addcmul(loc, torch.randn_like(loc), log_scale.exp())

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        logits, loc, _ = self._parts(params)
        return (torch.softmax(logits, -1) * loc).sum(-1)

    def allowed(self, dim: int) -> str:
        return "a number"

    def start(self, data: Tensor | None) -> Tensor:
        middles = torch.special.ndtri(_middles(self.num_components, self.like.double()))
        rest = (1 - middles.square().mean()).sqrt()  # of the standard deviation, after that of the means
        if data is None:
            loc, scale = middles.expand(self.input_dim, -1), middles.new_ones(self.input_dim, 1)
        else:
            loc = _quantiles(data, self.num_components).double()
            scale = data.double().std(0, correction=0).unsqueeze(-1).clamp(min=torch.finfo(data.dtype).tiny)
        raw = soft_unclip((rest * scale).log().expand_as(loc), self.max_log_scale)
        return torch.cat((torch.zeros_like(loc), loc, raw), -1)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> list[Callable[[], object]]:
        calls, scale = _picking(self.num_components, self.max_log_scale, z, params, x)
        calls += [z.normal_, partial(x.addcmul_, z, scale)]
        return calls if features.data_ptr() == x.data_ptr() else [*calls, partial(features.copy_, x)]


class LogisticMixtureHead(Head):
    r"""Levels 0 to :math:`L - 1`, such as those of a pixel, from a mixture of logistics cut into bins.

    .. math:: P(x = k) = \sum_j w_j
        \left[\sigma\!\left(\frac{k + 1/2 - M_j}{S_j}\right) - \sigma\!\left(\frac{k - 1/2 - M_j}{S_j}\right)\right],

    the tails being added to the first and the last level.  The parameters are, for all :math:`K` components one after
    the other, logits of :math:`w`, means :math:`m` and :math:`a`, in units in which the levels go from -1 to 1:
    :math:`M = (m + 1) h` and :math:`S = h e^{c \tanh(a / c)}` with :math:`h = (L - 1) / 2` levels.  The network is
    given levels in these units too, :math:`x / h - 1`; values stay level numbers.

    Logarithms are right far out in the tails, and probabilities add up to 1 whatever the parameters.  ``bias()``
    spreads the means evenly, ``bias(data)`` over the quantiles of the data.  The mean sums over all levels.

    Args:
        levels: :math:`L`.
        num_components: :math:`K`.
        max_log_scale: the bound :math:`c`; by default the smallest scale is about a tenth of a level, and at most
            :math:`e^{-7}`.

    References:
        PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications
        (Salimans et al., 2017), arXiv:1701.05517.
    """

    def __init__(self, levels: int = 256, num_components: int = 10, max_log_scale: float | None = None) -> None:
        super().__init__()
        self.levels = _count("LogisticMixtureHead", levels, "levels", 2)
        self.num_components = _count("LogisticMixtureHead", num_components, "num_components", 1)
        self.half = 0.5 * (levels - 1)
        bound = max(7.0, math.log(10 * self.half)) if max_log_scale is None else float(max_log_scale)
        if not 0 < bound < math.inf:
            raise ValueError(f"LogisticMixtureHead: expected max_log_scale > 0, got {max_log_scale}")
        self.max_log_scale = bound
        self.num_params = 3 * num_components
        self.constraint = constraints.integer_interval(0, levels - 1)

    def _parts(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and means and log-scales in levels."""
        logits, loc, raw = params.unflatten(-1, (3, self.num_components)).unbind(-2)
        return logits, (loc + 1) * self.half, soft_clip(raw, self.max_log_scale) + math.log(self.half)

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        logits, loc, log_scale = self._parts(params)
        level = value.to(params.dtype).unsqueeze(-1)
        rate = torch.exp(-log_scale)
        # sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - e^(a - b)), without cancellation; b - a is the rate.
        upper = F.logsigmoid((level + 0.5 - loc) * rate)
        lower = F.logsigmoid((loc - (level - 0.5)) * rate)
        width = torch.log(-torch.expm1(-rate))
        first, last = level <= 0, level >= self.levels - 1
        zero = torch.zeros_like(upper)
        mass = torch.where(last, zero, upper) + torch.where(first, zero, lower + torch.where(last, zero, width))
        return torch.logsumexp(torch.log_softmax(logits, -1) + mass, -1)

    def sample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            loc, log_scale = _pick(*self._parts(params))
            noise = torch.logit(torch.rand_like(loc))
            return torch.addcmul(loc, noise, log_scale.exp()).round().clamp(0, self.levels - 1)

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        logits, loc, log_scale = self._parts(params)
        rate = torch.exp(-log_scale)
        above = torch.zeros_like(loc)
        for level in range(1, self.levels):  # the sum of P(x >= level)
            above = above + torch.sigmoid((loc - (level - 0.5)) * rate)
        return (torch.softmax(logits, -1) * above).sum(-1)

    def allowed(self, dim: int) -> str:
        return f"a level, 0 to {self.levels - 1},"

    def code(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        return (value * (1.0 / self.half) - 1).unsqueeze(-1)

    def start(self, data: Tensor | None) -> Tensor:
        count = self.num_components
        if data is None:
            loc = (2 * _middles(count, self.like) - 1).expand(self.input_dim, -1)
            scale = loc.new_full((self.input_dim, 1), 1 / count)
        else:
            scaled = data / self.half - 1
            loc = _quantiles(scaled, count)
            # A logistic of scale 1 has a standard deviation of 1.8; no narrower than half a level.
            scale = (scaled.std(0, correction=0) / (1.8 * math.sqrt(count))).clamp(min=0.5 / self.half).unsqueeze(-1)
        raw = soft_unclip(scale.log().expand_as(loc), self.max_log_scale)
        return torch.cat((torch.zeros_like(loc), loc, raw), -1)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> list[Callable[[], object]]:
        calls, scale = _picking(self.num_components, self.max_log_scale, z, params, x)
        half, one = number(self.half, x.dtype), number(1.0, x.dtype)
        return [
            *calls,
            z.uniform_,
            z.logit_,
            partial(x.addcmul_, z, scale),
            partial(x.add_, one),
            partial(x.mul_, half),
            x.round_,
            partial(x.clamp_, 0, self.levels - 1),
            partial(torch.mul, x, number(1.0 / self.half, x.dtype), out=features),
            partial(features.sub_, one),
        ]
