"""The affine map with a clamped log-scale, as in other libraries."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.univariate.base import Univariate

__all__ = ["ClampedAffine"]


class ClampedAffine(Univariate):
    r"""The affine map :math:`y = x\,e^{s} + m` with parameters :math:`(m, a)` and :math:`s = \min(\max(a, l), h)`.

    It is the map of Pyro's affine transforms, for weights that were trained there
    (:func:`~pyro_flows.flows.from_pyro`).  Beyond the bounds, a parameter :math:`a` has no gradient, so a log-scale
    that got there stays there; for new flows, :class:`~pyro_flows.univariate.base.Affine` has a smooth bound.

    Args:
        low: the bound :math:`l` of the log-scale, 0 or less, so that parameters of zero give the identity.
        high: the bound :math:`h`, 0 or more.

    Raises:
        ValueError: for bounds of other signs.

    Example:
        >>> x, params = torch.tensor([1.0]), torch.tensor([[0.5, 9.0]])
        >>> y, ladj = pf.univariate.ClampedAffine().forward(x, params)
        >>> ladj  # the log-scale 9 is clamped to 3
        tensor([3.])

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), arXiv:1606.04934.
    """

    num_params = 2

    def __init__(self, low: float = -5.0, high: float = 3.0) -> None:
        if not low <= 0 <= high:
            raise ValueError(f"ClampedAffine: expected low <= 0 <= high, got {low} and {high}")
        self.low, self.high = float(low), float(high)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-1)
        ladj = raw.clamp(self.low, self.high)
        return torch.addcmul(shift, x, ladj.exp()), ladj

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-1)
        ladj = -raw.clamp(self.low, self.high)
        return (y - shift) * ladj.exp(), ladj
