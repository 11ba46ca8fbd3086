"""The logit with a margin on which images are usually modeled."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_flows.core.checks import integer
from pyro_flows.core.transform import FlowTransform

__all__ = ["LogitPixels"]


class LogitPixels(FlowTransform):
    r"""Maps real numbers to intensities in units of pixel levels, by a sigmoid that reaches a little beyond them.

    From data to base, with :math:`L` levels and the margin :math:`\lambda`,

    .. math:: x = \operatorname{logit}\left(\lambda + (1 - 2\lambda) \frac{v}{L}\right)
        \qquad \log \frac{dv}{dx} = \log \frac{L}{1 - 2\lambda} - \log(1 + e^{x}) - \log(1 + e^{-x}),

    summed over the event.  A pixel of value :math:`n` is the interval :math:`[n, n + 1)` of :math:`v`, over which the
    density integrates to :math:`P(n)`.  The data side is :math:`[-\lambda L / (1 - 2\lambda),\ L + \lambda L / (1 -
    2\lambda)]`; a number that would round to an edge goes to the last number inside, and log-determinants are exact
    there too.  Each direction is elementwise.

    Args:
        event_shape: an ``input_dim`` or the shape of one event, e.g. ``(channels, height, width)``.
        levels: :math:`L`, the number of values of a pixel.
        margin: :math:`\lambda`, between 0 and 1/2 (papers: 1e-6 for MNIST, 0.05 for CIFAR-10 and ImageNet).

    Raises:
        ValueError: for ``levels`` or a ``margin`` out of range.

    Example:
        >>> chain = pf.Chain([*pf.realnvp(4, num_layers=2), pf.LogitPixels(4, levels=16)])
        >>> pixels = pf.Dequantized(pf.Flow(chain), levels=16).sample((5,))
        >>> bool(((pixels >= 0) & (pixels <= 15)).all())
        True

    References:
        Density estimation using Real NVP (Dinh et al., 2016), section 4.1, arXiv:1605.08803.
        MintNet: Building Invertible Neural Networks with Masked Convolutions (Song et al., 2019), arXiv:1907.07945.
    """

    sampling_cost = density_cost = "1 product"

    def __init__(self, event_shape: int | Iterable[int], levels: int = 256, margin: float = 0.05) -> None:
        super().__init__(event_shape)
        integer("LogitPixels", "levels", levels, 2)
        if not 0 < margin < 0.5:
            raise ValueError(f"LogitPixels: expected margin to be a number between 0 and 1/2, got {margin!r}")
        self.levels, self.margin = levels, float(margin)
        self._width = levels / (1 - 2 * self.margin)
        self._beyond = self._width * self.margin  # the reach below 0 and above the levels
        self._ends = {dtype: _ends(levels, self._beyond, dtype) for dtype in (torch.float32, torch.float64)}

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        reach = constraints.interval(-self._beyond, self.levels + self._beyond)
        return constraints.independent(reach, len(self.event_shape))

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        r""":math:`\log dx_i / dv_i` in nats, of the shape of ``y``."""
        return self._base_and_slopes(y)[1]

    def _base_and_slopes(self, y: Tensor) -> tuple[Tensor, Tensor]:
        # Distances from both ends, exact where small.
        below, above = torch.log(y + self._beyond), torch.log((self.levels - y) + self._beyond)
        return below - above, math.log(self._width) - below - above

    def _total(self, slopes: Tensor) -> Tensor:
        return slopes.sum(tuple(range(-len(self.event_shape), 0)))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low = torch.sigmoid(x) * self._width - self._beyond
        high = self.levels - (torch.sigmoid(-x) * self._width - self._beyond)
        y = torch.where(x > 0, high, low)
        first, last = self._ends.get(x.dtype, self._ends[torch.float32])
        # Only rounding changes, so the gradient ignores it.
        y = y + (y.clamp(first, last) - y).detach()
        return y, self._total(math.log(self._width) - 2 * torch.logaddexp(0.5 * x, -0.5 * x))

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, slopes = self._base_and_slopes(y)
        return x, self._total(slopes)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels}, margin={self.margin:g}"


def _ends(levels: int, beyond: float, dtype: torch.dtype) -> tuple[float, float]:
    """The first and the last number of this dtype with a finite logit."""
    low, high = (torch.tensor(end, dtype=dtype, device="cpu") for end in (-beyond, levels + beyond))
    while low + beyond <= 0:
        low = torch.nextafter(low, torch.zeros_like(low))
    while (levels - high) + beyond <= 0:
        high = torch.nextafter(high, torch.zeros_like(high))
    return float(low), float(high)
