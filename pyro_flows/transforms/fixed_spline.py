"""Fixed monotone splines of single dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.core.checks import event_size
from pyro_flows.core.modes import by_hand
from pyro_flows.core.transform import FlowTransform
from pyro_flows.univariate.base import numbers
from pyro_flows.univariate.spline import Bin, forward_in_bin, inverse_in_bin

__all__ = ["FixedSpline"]


class FixedSpline(FlowTransform):
    r"""A fixed increasing spline :math:`y_i = g_i(x_i)` in some dimensions; the others stay as they are.

    :math:`g_i` goes through knots :math:`(x_{ik}, y_{ik})` with slopes :math:`\delta_{ik}`, by the rational quadratic
    of :class:`~pyro_flows.univariate.Spline` between two knots, and along a line beyond the first and the last one. Its
    derivative is continuous, and may bend at each knot. Nothing is learned. Each direction costs a binary search and
    some thirty elementwise operations for the bent dimensions, and :math:`\log|\det| = \sum_i \log g_i'(x_i)`.

    With :math:`y_{ik} = F_i^{-1}(\Phi(x_{ik}))`, :math:`g_i` makes a variable with the distribution function
    :math:`F_i` of a standard normal: heavy tails, bounded sides and kinks that a smooth flow of light tails lacks.

    Args:
        input_dim: the number of dimensions.
        dims: the bent dimensions, ``(d,)``, each at most once.
        knots: :math:`x`, :math:`y` and :math:`\delta`, shape ``(3, d, K)``: the first two strictly increasing, the
            third positive.

    Raises:
        ValueError: for other shapes, dimensions or knots.

    Example:
        >>> x, slopes = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 4.0])
        >>> knots = torch.stack([x, x.sinh(), slopes]).unsqueeze(1)
        >>> bent = pf.transforms.FixedSpline(2, torch.tensor([0]), knots)
        >>> bent(torch.tensor([1.0, 5.0]))  # the first dimension is bent
        tensor([1.1752, 5.0000])

    References:
        Neural Spline Flows (Durkan et al., 2019), arXiv:1906.04032.
    """

    sampling_cost = density_cost = "1 spline"
    half_precision = False
    dims: Tensor
    knots: Tensor

    def __init__(self, input_dim: int, dims: Tensor, knots: Tensor) -> None:
        super().__init__(event_size(input_dim))
        size = self.event_shape.numel()
        if dims.dim() != 1 or knots.shape[:-1] != (3, len(dims)) or knots.dim() != 3 or knots.shape[-1] < 2:
            raise ValueError(
                "FixedSpline: expected dims of shape (d,) and knots of shape (3, d, K) with K >= 2, got "
                f"{tuple(dims.shape)} and {tuple(knots.shape)}"
            )
        if not knots.is_floating_point() or dims.is_floating_point():
            raise ValueError(
                f"FixedSpline: expected integer dims and floating-point knots, got {dims.dtype} and {knots.dtype}"
            )
        if not dims.is_meta:
            known = set(dims.tolist())
            if not len(dims) or len(known) < len(dims) or not known <= set(range(size)):
                raise ValueError(
                    f"FixedSpline: expected dims to be different numbers of 0 ... {size - 1}, got {dims.tolist()}"
                )
            if not (knots.isfinite().all() and (knots[:2].diff(dim=-1) > 0).all() and (knots[2] > 0).all()):
                raise ValueError(
                    "FixedSpline: expected finite knots, strictly increasing on both sides, with positive slopes; "
                    "leave equal ones out"
                )
        self.register_buffer("dims", dims.detach().clone())
        self.register_buffer("knots", knots.detach().clone())

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """The constructor's arguments."""
        return (*self.event_shape, self.dims, self.knots), {}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bent: {len(self.dims)} of {self.event_shape.numel()}"

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._moved(x, inverse=False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._moved(y, inverse=True)

    def _moved(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        # Dimensions first, because each has its own knots.
        rows = value.index_select(-1, self.dims).movedim(-1, 0).reshape(len(self.dims), -1)
        own = self.knots[1 if inverse else 0]
        within = torch.minimum(torch.maximum(rows, own[:, :1]), own[:, -1:])
        index = _below(own[:, 1:-1].contiguous(), within.detach()).expand(3, -1, -1)
        low, high = self.knots.gather(2, index), self.knots.gather(2, index + 1)
        width, height, _ = (high - low).unbind()
        part = Bin(low[0], width, low[1], height, low[2], high[2], ())
        beyond = rows - within
        move = inverse_in_bin if inverse else forward_in_bin
        moved, _, slope = move(within, beyond, part, numbers(rows.dtype))
        moved = torch.addcdiv(moved, beyond, slope) if inverse else torch.addcmul(moved, beyond, slope)
        log_slope = slope.log().sum(0).reshape(value.shape[:-1])
        moved = moved.reshape(len(self.dims), *value.shape[:-1]).movedim(0, -1)
        return value.index_copy(-1, self.dims, moved), -log_slope if inverse else log_slope


def _below(knots: Tensor, values: Tensor) -> Tensor:
    """Counts the knots ``(d, K)`` below each value ``(d, n)``."""
    if by_hand():
        return torch.searchsorted(knots, values.contiguous())
    # The search warns of the layouts that torch.vmap makes.
    return (knots.unsqueeze(1) < values.unsqueeze(-1)).sum(-1)
