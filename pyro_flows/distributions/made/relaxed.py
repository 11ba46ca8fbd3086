"""Heads of continuous variables that stand in for discrete ones, with differentiable draws."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyro_flows.distributions.made.contract import Head

__all__ = ["RelaxedBernoulliHead"]


class RelaxedBernoulliHead(Head):
    r"""Values in (0, 1), :math:`x = \sigma((\theta + \ell) / t)` with logistic noise :math:`\ell` and temperature t.

    The parameter is the logit of a binary variable, which is 1 where :math:`x > 1/2`; x tends to it as the temperature
    falls to 0.  The density is that of x itself, so that a bound on the evidence with it is that of the relaxed model.
    Draws and values are kept off 0 and 1 by the smallest positive number and by one rounding error: at temperatures
    below some 0.2 the logit of a value close to 1 has few digits left in float32, and the density as few.

    Args:
        temperature: :math:`t > 0`; the attribute of this name may be changed along the way.

    References:
        The Concrete Distribution (Maddison et al., 2016), arXiv:1611.00712.
        Categorical Reparameterization with Gumbel-Softmax (Jang et al., 2016), arXiv:1611.01144.
    """

    discrete = False
    has_rsample = True
    constraint = constraints.unit_interval

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"RelaxedBernoulliHead: expected temperature > 0, got {temperature}")
        self.temperature = float(temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        value = _off_ends(value.to(params.dtype))
        log_value, log_rest = torch.log(value), torch.log1p(-value)
        noise = (log_value - log_rest) * self.temperature - params.squeeze(-1)
        # The logistic density of the noise, and the slope t / (x (1 - x)).
        density = F.logsigmoid(noise) + F.logsigmoid(-noise)
        return density + math.log(self.temperature) - log_value - log_rest

    def rsample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        logits = params.squeeze(-1)
        noise = torch.logit(_off_ends(torch.rand_like(logits)))
        return _off_ends(torch.sigmoid((logits + noise) / self.temperature))

    def inside(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        return (value > 0) & (value < 1)

    def allowed(self, dim: int) -> str:
        return "a number strictly between 0 and 1"


def _off_ends(value: Tensor) -> Tensor:
    info = torch.finfo(value.dtype)
    return value.clamp(info.tiny, 1 - info.eps / 2)
