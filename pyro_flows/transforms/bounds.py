"""Numbers between bounds, of each dimension its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import StackTransform, Transform, biject_to, constraints, transform_to

from pyro_flows.core.checks import first_few
from pyro_flows.core.transform import REAL, FlowTransform

__all__ = ["Bounds", "Within"]


class Within(constraints.stack):
    """Vectors with each number strictly between its bounds, of which either may be infinite."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        super().__init__([_between(*ends) for ends in zip(low.tolist(), high.tolist(), strict=True)], -1)

    def check(self, value: Tensor) -> Tensor:
        """Tells which vectors are inside, shape ``(*batch,)``."""
        inside = (value > self.low.to(value)) & (value < self.high.to(value))
        return inside.all(-1)

    def __repr__(self) -> str:
        pairs = [f"({a:g}, {b:g})" for a, b in zip(self.low.tolist(), self.high.tolist(), strict=True)]
        return f"Within({first_few(pairs, 8)})"


def _between(low: float, high: float) -> constraints.Constraint:
    if math.isfinite(low):
        return constraints.interval(low, high) if math.isfinite(high) else constraints.greater_than(low)
    return constraints.less_than(high) if math.isfinite(high) else constraints.real


@biject_to.register(Within)
@transform_to.register(Within)
def _from_line(within: Within) -> Transform:
    return StackTransform([biject_to(each) for each in within.cseq], -1)


class Bounds(FlowTransform):
    r"""Maps each number of a vector from the line onto an interval, a half-line or the line, increasing.

    With the sigmoid :math:`\varsigma`,

    .. math:: y_i = \begin{cases}
        a_i + (b_i - a_i) \, \varsigma(x_i) & \text{between } a_i \text{ and } b_i \\
        a_i + e^{x_i} & \text{above } a_i \\
        b_i - e^{-x_i} & \text{below } b_i \\
        x_i & \text{without bounds}
        \end{cases}

    and back, :math:`x_i = \log(y_i - a_i) - \log(b_i - y_i)`, without the term of a bound that is infinite.  A number
    that would round to a bound goes to the last number inside.  Each direction is elementwise.

    Args:
        low: the lower bounds :math:`a_i`, one for each dimension; minus infinity for none.
        high: the upper bounds :math:`b_i`; infinity for none.

    Raises:
        ValueError: for bounds that are no two vectors of one length, or a lower one that is not below the upper one.

    Example:
        >>> inf = float("inf")
        >>> ends = pf.transforms.Bounds([0.0, 0.0, -inf], [1.0, inf, inf])
        >>> ends(torch.zeros(3)).tolist()
        [0.5, 1.0, 0.0]

    References:
        The transforms of Stan (Carpenter et al., 2017), section 2.7 of its reference manual; behind a flow, as in
        Automatic Differentiation Variational Inference (Kucukelbir et al., 2016), arXiv:1603.00788.
    """

    sampling_cost = density_cost = "1 product"
    low: Tensor
    high: Tensor

    def __init__(self, low: Sequence[float] | Tensor, high: Sequence[float] | Tensor) -> None:
        ends = [torch.as_tensor(each).detach() for each in (low, high)]
        ends = [each if each.is_floating_point() else each.to(torch.get_default_dtype()) for each in ends]
        if ends[0].dim() != 1 or ends[0].shape != ends[1].shape:
            raise ValueError(
                "Bounds: expected low and high as vectors of one length, with a number for each dimension, got shapes "
                f"{tuple(ends[0].shape)} and {tuple(ends[1].shape)}"
            )
        super().__init__(len(ends[0]))
        for name, each in zip(("low", "high"), ends, strict=True):
            self.register_buffer(name, each.clone())
        if self.low.is_meta:
            return
        wrong = ~(self.low < self.high)
        if wrong.any():
            k = int(wrong.nonzero()[0])
            raise ValueError(
                f"Bounds: expected low < high in every dimension, got {float(self.low[k])} and {float(self.high[k])} "
                f"in dimension {k}; infinity stands for no bound"
            )

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        return REAL[1] if self.low.is_meta else Within(self.low, self.high)

    def _ends(self, like: Tensor) -> tuple[Tensor, ...]:
        """The bounds in a value's dtype, 0 for none, and where there is one."""
        low, high = self.low.to(like.dtype), self.high.to(like.dtype)
        lower, upper = low.isfinite(), high.isfinite()
        return torch.where(lower, low, 0.0), torch.where(upper, high, 0.0), lower, upper

    def _inside(self, y: Tensor) -> Tensor:
        """Moves numbers that were rounded to a bound to the last number inside."""
        low, high = self.low.to(y.dtype), self.high.to(y.dtype)
        tiny = torch.finfo(y.dtype).tiny
        first = torch.maximum(torch.nextafter(low, high), low + tiny)
        last = torch.minimum(torch.nextafter(high, low), high - tiny)
        first, last = torch.where(low.isfinite(), first, low), torch.where(high.isfinite(), last, high)
        # Only rounding changes, so the gradient ignores it.
        moved = torch.where(y < first, first - y, torch.where(y > last, last - y, 0.0))
        return y + moved.detach()

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high, lower, upper = self._ends(x)
        both, free = lower & upper, ~(lower | upper)
        width = torch.where(both, high - low, 1.0)
        # Each branch gets numbers that cannot overflow in it, because NaN in its gradient would reach the others.
        inner, above = torch.where(both, x, 0.0), torch.where(lower & ~upper, x, 0.0)
        below = torch.where(upper & ~lower, -x, 0.0)
        between = torch.where(inner > 0, high - width * torch.sigmoid(-inner), low + width * torch.sigmoid(inner))
        y = torch.where(both, between, torch.where(lower, low + above.exp(), high - below.exp()))
        slopes = torch.where(both, width.log() - 2 * torch.logaddexp(0.5 * inner, -0.5 * inner), above + below)
        return self._inside(torch.where(free, x, y)), slopes.sum(-1)

    def _base_and_slopes(self, y: Tensor) -> tuple[Tensor, Tensor]:
        low, high, lower, upper = self._ends(y)
        # Distances from both ends, exact where small; beyond a bound, the number on the line is infinite.
        below = torch.where(lower, y - low, 1.0).clamp(min=0.0).log()
        above = torch.where(upper, high - y, 1.0).clamp(min=0.0).log()
        width = torch.where(lower & upper, high - low, 1.0)
        return torch.where(lower | upper, below - above, y), width.log() - below - above

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, slopes = self._base_and_slopes(y)
        return x, slopes.sum(-1)

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        r""":math:`\log dx_i / dy_i` in nats, of the shape of ``y``."""
        return self._base_and_slopes(y)[1]

    def extra_repr(self) -> str:
        """The bounds, beside what all parts say."""
        return f"{super().extra_repr()}, {'on meta' if self.low.is_meta else Within(self.low, self.high)!r}"
