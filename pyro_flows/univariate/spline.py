"""Monotone rational-quadratic splines.

Every denominator is a sum of positive terms, so values and gradients stay finite in single precision for any input.
Parameters are rows and inputs columns, so the costly choice of a bin runs over contiguous memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_flows.core.checks import choice, integer
from pyro_flows.core.modes import GradientByHand, by_hand
from pyro_flows.core.recipes import options_of
from pyro_flows.univariate.base import Univariate, numbers

__all__ = ["Bin", "Spline", "forward_in_bin", "inverse_in_bin"]

_Number = Callable[[float], Tensor]

_RANGE = math.log(1e3)  # bounds the ratio of two bins, and a slope


_BOUNDARIES = ("linear", "identity", "circular", "interval")


_PIECE = 2**14  # inputs that fit in a processor's cache


_KEPT = 13  # tensors for a gradient; one more unless circular


class Bin(NamedTuple):
    """The bin of each input on the unit square, shape ``(columns,)`` each; ``kept`` is for the gradient."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    slope0: Tensor
    slope1: Tensor
    kept: tuple[Tensor, ...]


class Spline(Univariate):
    r"""Rational-quadratic spline through :math:`K + 1` knots, increasing, with a continuous derivative.

    Knots :math:`(x_k, y_k)` divide the square :math:`[-B, B]^2` into bins of widths and heights
    :math:`\propto e^{c(a)}`, with slopes :math:`\delta_k = e^{c(b_k)}` at the knots.  A smooth clip :math:`c` keeps
    slopes and ratios of bins within :math:`10^{\pm 3}`.  With a bin's mean slope :math:`s_k` and
    :math:`\xi = (x - x_k) / (x_{k+1} - x_k)`,

    .. math::
        y = y_k + (y_{k+1} - y_k)
            \frac{s_k \xi^2 + \delta_k \xi (1 - \xi)}{s_k + (\delta_k + \delta_{k+1} - 2 s_k)\, \xi (1 - \xi)},

    and the inverse solves a quadratic equation.  All-zero parameters give the identity.  Each direction takes some
    forty elementwise operations.

    Args:
        bins: the number :math:`K` of bins, at least 2.
        bound: half the side :math:`B` of the square.
        boundary: the map beyond the square.  ``"linear"``: a line with the last knot's learned slope;
            ``"identity"``: :math:`y = x`, as in the paper; ``"circular"``: inputs are angles modulo :math:`2\pi`,
            :math:`B = \pi`, both ends share one slope, and a rotation follows; ``"interval"``: the square is
            :math:`[0, 1]^2` with a line beyond, and a number near 0 keeps its relative accuracy in both directions.

    Raises:
        ValueError: for fewer than two bins, a bound that is not positive, or an unknown boundary.

    Example:
        >>> flow = pf.Flow(pf.Chain([pf.Coupling(2, pf.Spline(bins=4, bound=3.0))]))
        >>> flow.sample((5,)).shape
        torch.Size([5, 2])

    References:
        Neural Spline Flows (Durkan et al., 2019), arXiv:1906.04032.
        Normalizing Flows on Tori and Spheres (Rezende et al., 2020), arXiv:2002.02428.
    """

    half_precision = False

    def __init__(self, bins: int = 8, bound: float | None = None, boundary: str = "linear") -> None:
        integer("Spline", "bins", bins, 2)
        choice("Spline", "boundary", boundary, _BOUNDARIES)
        own = {"circular": math.pi, "interval": 0.5}.get(boundary)
        if own is not None and bound is not None:
            name = {"circular": "pi", "interval": "1"}[boundary]
            raise ValueError(f"Spline: the boundary {boundary!r} has the bound {name}: leave bound out")
        if bound is not None and not 0 < bound < math.inf:
            raise ValueError(f"Spline: expected bound to be positive and finite, got {bound}")
        self.bins = bins
        self.boundary = boundary
        self.bound = float(5.0 if bound is None else bound) if own is None else own
        self._center = 0.0 if boundary == "interval" else 0.5  # the input 0 on the unit square

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        return (), options_of(self) | ({"bound": None} if self.boundary in ("circular", "interval") else {})

    @property
    def num_params(self) -> int:  # type: ignore[override]  # bins and boundary say it
        """Number of widths, heights and slopes, and one rotation if circular."""
        return 2 * self.bins + (self.bins - 1 if self.boundary == "identity" else self.bins + 1)

    @property
    def periodic(self) -> bool:  # type: ignore[override]  # the boundary says it
        """Whether inputs are angles."""
        return self.boundary == "circular"

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._move(False, x, params.movedim(-1, 0))

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._move(True, y, params.movedim(-1, 0))

    def plain(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(inverse, z, params)[:2]

    def _move(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        if by_hand() and torch.is_grad_enabled() and (z.requires_grad or params.requires_grad):
            return _Move.record(self, inverse, z, params)
        return self.run(inverse, z, params)[:2]

    def run(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        columns, rows = z.reshape(-1), params.reshape(params.shape[0], z.numel())
        if z.numel() <= 2 * _PIECE or not by_hand():
            x, ladj, kept = self._run(inverse, columns, rows)
        else:
            pieces = [
                self._run(inverse, *each) for each in zip(columns.split(_PIECE), rows.split(_PIECE, 1), strict=True)
            ]
            x, ladj = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
            kept = tuple(tensor for piece in pieces for tensor in piece[2])
        return x.view(z.shape), ladj.view(z.shape), kept

    def pull(
        self, inverse: bool, z: Tensor, x: Tensor, ladj: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        count = _KEPT + (self.boundary != "circular")
        columns, logs = grad.reshape(-1), grad_ladj.expand_as(grad).reshape(-1)
        if len(kept) == count:
            by_z, by_params = self._pull(inverse, kept, columns, logs)
        else:
            groups = [kept[k : k + count] for k in range(0, len(kept), count)]
            grads = zip(groups, columns.split(_PIECE), logs.split(_PIECE), strict=True)
            pieces = [self._pull(inverse, *each) for each in grads]
            by_z, by_params = torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces], 1)
        return by_z.view(grad.shape), by_params.view(self.num_params, *grad.shape)

    # Below, inputs have shape (columns,) and parameters (num_params, columns).

    def _run(self, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        number = numbers(z.dtype)
        center, side = number(self._center), number(2 * self.bound)
        circular = self.boundary == "circular"
        unit = torch.add(center, (z - params[-1] if circular and inverse else z) * number(0.5 / self.bound))
        if circular:
            unit = unit - unit.floor()
        within = unit.clamp(0.0, 1.0)
        part = self._bin(within, params, inverse, number)
        beyond = None if circular else unit - within  # zero inside
        moved, xi, slope = (inverse_in_bin if inverse else forward_in_bin)(within, beyond, part, number)
        if inverse and self.boundary == "interval":
            moved, xi, slope = _polished(within, beyond, part, xi, number)
        ladj = slope.log()
        if beyond is None:
            x = (moved - center) * side
            if not inverse:
                x = x + params[-1]
                x = x - torch.floor(x / side + center) * side
            kept = (xi, slope, *part[:6], *part.kept)
        else:
            x = torch.addcdiv(moved, beyond, slope) if inverse else torch.addcmul(moved, beyond, slope)
            x = (x - center) * side
            kept = (xi, slope, *part[:6], *part.kept, beyond)
        return x, -ladj if inverse else ladj, kept

    def _bin(self, value: Tensor, params: Tensor, inverse: bool, number: _Number) -> Bin:
        count, columns = self.bins, value.shape[0]
        raw, knots = params[: 2 * count], params[2 * count :]
        bend, logs = _soft_sign(raw, _RANGE / 2, number)
        sizes = logs.exp().view(2, count, columns)
        ends = sizes.cumsum(1)
        total = ends[:, -1]
        side = 1 if inverse else 0
        index = torch.lt(ends[side, :-1], value * total[side]).sum(0)
        both = index.expand(2, 1, columns)
        size, end = sizes.gather(1, both).squeeze(1), ends.gather(1, both).squeeze(1)
        (left, bottom), (width, height) = ((end - size) / total).unbind(), (size / total).unbind()
        slope_bend, slopes = _soft_sign(knots.gather(0, self._ends(index)), _RANGE, number)
        slopes = slopes.exp()
        if self.boundary == "identity":
            slopes = torch.where(self._inner(index), slopes, number(1.0))
        slope0, slope1 = slopes.unbind()
        return Bin(left, width, bottom, height, slope0, slope1, (bend, sizes, total, index, slope_bend))

    def _ends(self, index: Tensor) -> Tensor:
        """Indices of the slopes at a bin's two ends, shape ``(2, columns)``."""
        if self.boundary == "identity":
            return torch.stack(((index - 1).clamp(min=0), index.clamp(max=self.bins - 2)))
        if self.boundary == "circular":
            return torch.stack((index, (index + 1) % self.bins))
        return torch.stack((index, index + 1))

    def _inner(self, index: Tensor) -> Tensor:
        """Whether a bin's two knots lie inside the square."""
        return torch.stack((index > 0, index < self.bins - 1))

    def _pull(self, inverse: bool, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor) -> tuple[Tensor, Tensor]:
        xi, m, left, width, bottom, height, d0, d1, bend, sizes, total, index, slope_bend, *tail = kept
        circular = not tail
        number = numbers(xi.dtype)
        one, two, side = number(1.0), number(2.0), number(2 * self.bound)
        om = one - xi
        q, xi2, om2 = xi * om, xi * xi, om * om
        s = height / width
        p0, p1 = d0 * om, d1 * xi
        a, b = torch.addcmul(p0, s, xi), torch.addcmul(p1, s, om)
        top = xi * a
        den = torch.addcmul(top, om, b)
        ratio = top / den
        grad_unit = grad * side
        by_log = -grad_ladj if inverse else grad_ladj
        if not circular:
            beyond = tail[0]
            outside = grad_unit * beyond
            by_log = torch.addcdiv(by_log, outside, m, value=-1) if inverse else torch.addcmul(by_log, outside, m)
        # Gradient of the log-slope.
        v, k = by_log * two / den, by_log / torch.addcmul(xi * b, om, a)
        turn = om - xi
        log_xi = two * k * (torch.addcmul(p1, s, turn) - p0) - v * (d0 + d1 - two * s) * turn
        if inverse:
            by_z = (log_xi / width + grad_unit) / m
            by_y = -by_z
            by_z = by_z / side
        else:
            by_y = grad_unit
        if not circular and inverse:
            inner = beyond == 0
            by_y = torch.where(inner, by_y, number(0.0))
            by_z = torch.where(inner, by_z, grad / m)
        u = by_y * height / den
        beta = torch.addcmul(v, u, ratio)
        alpha = u - beta
        by_s = xi2 * alpha - om2 * beta + two * torch.addcmul(by_log / s, k, q)
        by_slopes = torch.stack((torch.addcmul(q * alpha, k, om2) * d0, torch.addcmul(k * xi2, q, beta, value=-1) * d1))
        by_left = torch.addcmul(log_xi, by_y * m, width) / width.neg()
        by_bottom = by_y
        by_height = torch.addcdiv(by_y * ratio, by_s, width)
        by_width = torch.addcmul(by_left * xi, by_s / width, s, value=-1)
        if not inverse:
            by_z = by_left / -side
            if not circular:
                by_z = torch.where(beyond == 0, by_z, grad * m)
        # Gradient with respect to the parameters.
        count, columns = self.bins, xi.shape[0]
        out = torch.empty(self.num_params, columns, dtype=xi.dtype, device=xi.device)
        by_ends = torch.stack((by_left, by_bottom)) / total
        by_sizes = torch.stack((by_width, by_height)) / total
        mean = torch.addcmul(by_ends * torch.stack((left, bottom)), by_sizes, torch.stack((width, height)))
        rows = out[: 2 * count].view(2, count, columns)
        before = torch.arange(count, device=xi.device)[:, None] < index
        torch.mul(before, by_ends.unsqueeze(1), out=rows)
        rows.scatter_add_(1, index.expand(2, 1, columns), by_sizes.unsqueeze(1))
        rows.sub_(mean.unsqueeze(1)).mul_(sizes)
        out[: 2 * count].div_(bend).div_(bend)
        by_slopes = by_slopes / (slope_bend * slope_bend)
        if self.boundary == "identity":
            by_slopes = torch.where(self._inner(index), by_slopes, number(0.0))
        out[2 * count :].zero_().scatter_add_(0, self._ends(index), by_slopes)
        if circular:
            out[-1] = -by_z if inverse else grad
        return by_z, out


def _soft_sign(value: Tensor, bound: float, number: _Number) -> tuple[Tensor, Tensor]:
    r"""Returns ``(t, value / t)`` with :math:`t = 1 + |a| / c`, a smooth clip to ``(-bound, bound)``."""
    bend = torch.add(number(1.0), value.abs(), alpha=1.0 / bound)
    return bend, torch.div(value, bend)


def _to_end(share: Tensor, beyond: Tensor | None, number: _Number) -> Tensor:
    """Clamps a share of a bin, beyond the square to exactly 0 or 1."""
    if beyond is not None:
        share = torch.addcmul(share, beyond.detach(), number(1e15))
    return share.clamp(0.0, 1.0)


def forward_in_bin(value: Tensor, beyond: Tensor | None, part: Bin, number: _Number) -> tuple[Tensor, Tensor, Tensor]:
    """Returns value, share ``xi`` of the bin, and slope at a point of the unit interval."""
    left, width, bottom, height, d0, d1, _ = part
    xi = _to_end((value - left) / width, beyond, number)
    ratio, slope = _quotient(xi, height / width, d0, d1, number(1.0))
    return torch.addcmul(bottom, height, ratio), xi, slope


def _quotient(xi: Tensor, s: Tensor, d0: Tensor, d1: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the share of the height and the slope at the share ``xi`` of the width."""
    om = one - xi
    a, b = torch.addcmul(d0 * om, s, xi), torch.addcmul(d1 * xi, s, om)
    top = xi * a
    den = torch.addcmul(top, om, b)
    root = s / den
    return top / den, root * root * torch.addcmul(xi * b, om, a)


def inverse_in_bin(value: Tensor, beyond: Tensor | None, part: Bin, number: _Number) -> tuple[Tensor, Tensor, Tensor]:
    """Inverts :func:`forward_in_bin`; the slope is that function's."""
    left, width, bottom, height, d0, d1, _ = part
    one, two = number(1.0), number(2.0)
    s = height / width
    eta = ((value - bottom) / height).clamp(0.0, 1.0)
    # The form of the root without cancellation; its discriminant is a sum of positive terms.
    rest = one - eta
    twice = two * s
    b = torch.addcmul(d0 * rest, twice - d1, eta)
    above = b > s
    far, near = torch.where(above, eta, rest), torch.where(above, rest, eta)
    lean = (s - b).abs()
    least = s - lean
    disc = torch.addcmul(least * least, two * twice * near, lean)
    step = twice * far / (s + lean + disc.sqrt())
    xi = _to_end(torch.where(above, step, one - step), beyond, number)
    return torch.addcmul(left, width, xi), xi, _quotient(xi, s, d0, d1, one)[1]


def _polished(
    value: Tensor, beyond: Tensor | None, part: Bin, xi: Tensor, number: _Number
) -> tuple[Tensor, Tensor, Tensor]:
    """Refines a small share of :func:`inverse_in_bin` by a step of Newton: its error is then relative."""
    left, width, bottom, height, d0, d1, _ = part
    s, one = height / width, number(1.0)
    ratio, slope = _quotient(xi, s, d0, d1, one)
    better = _to_end(xi - (ratio - (value - bottom) / height) * s / slope, beyond, number)
    xi = torch.where(xi < 0.01, better, xi)
    return torch.addcmul(left, width, xi), xi, _quotient(xi, s, d0, d1, one)[1]


class _Move(GradientByHand):
    """A spline with a closed-form gradient."""

    @staticmethod
    def forward(ctx: Any, spline: Spline, inverse: bool, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj, kept = spline.run(inverse, z, params)
        ctx.spline, ctx.inverse = spline, inverse
        ctx.save_for_backward(z, params, x, ladj, *kept)
        return x, ladj

    @staticmethod
    def plain(ctx: Any) -> tuple[Callable[..., tuple[Tensor, Tensor]], Sequence[Tensor]]:
        return partial(ctx.spline.plain, ctx.inverse), ctx.saved_tensors[:2]

    @staticmethod
    def pull(ctx: Any, grad: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        z, _, x, ladj, *kept = ctx.saved_tensors
        return None, None, *ctx.spline.pull(ctx.inverse, z, x, ladj, kept, grad, grad_ladj)
