"""Straightens latents whose density has kinks, heavy tails or steep sides along their axes."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_flows.core.transform import FlowTransform
from pyro_flows.infer.machine.pace import pace_of
from pyro_flows.infer.models.recorded import value_and_slope
from pyro_flows.infer.search.climb import LogDensity, SafeDensity
from pyro_flows.infer.search.probe import ModeProbe, probe_modes
from pyro_flows.infer.search.start import Start, find_start
from pyro_flows.transforms import FixedSpline

__all__ = ["Knots", "conditional_knots", "moved_with_slopes", "probe_behind", "straight_start"]

_FIRST = (-6.0, -4.0, -2.5, -1.5, -0.7, 0.0, 0.7, 1.5, 2.5, 4.0, 6.0)  # first nodes, in conditional sds
_BENT = 0.01  # negentropy, in nats, that is worth a spline
_LEAST, _MOST = 1e-10, 1e-7  # mass beyond the last node
_UNKNOWN = 1e-3  # mass beyond the last node that makes a conditional unknown
_TRIALS = 60  # places of a last node
_MESH = 16  # nodes on each side
_ROUNDS, _PAIRS = 5, 6  # of more nodes
_SHORT = 1e-2  # least interval for more nodes, in widths
_SHARP = 0.1  # change of slope, over the width, between two near nodes that makes a kink
_DEEP, _FLOOR = 14.0, -1e3  # nats below the peak that matter little, and not at all
_GAIN = 0.05  # ELBO, in nats, that splines must gain
_PLAIN = 0.75  # share of the seconds for the start without splines
_FIRST_SHARE = 0.3  # of what is left, for the first nodes
_PLACES, _WEIGHTS = (0.5 * torch.from_numpy(part)[:, None, None] for part in np.polynomial.legendre.leggauss(8))


class Knots(NamedTuple):
    """Knots of a :class:`~pyro_flows.transforms.FixedSpline`, float64 on the CPU."""

    dims: Tensor
    """The bent dimensions, ``(d,)``."""
    knots: Tensor
    """Standard normal places, values and slopes, ``(3, d, K)``."""


class _Lines:
    """The densities along axes ``dims`` through ``center``, at ``offsets`` ``(d, n)`` from it in increasing order.

    ``values`` and ``slopes`` are the log-densities there and their derivatives. The log-density is a cubic between two
    nodes, and falls like a power of the distance from ``center`` beyond the first and the last.
    """

    def __init__(self, dims: Tensor, center: Tensor, offsets: Tensor, values: Tensor, slopes: Tensor) -> None:
        self.dims, self.center = dims, center
        self.offsets, self.values, self.slopes = offsets, values, slopes
        self.peak = values.amax(-1, keepdim=True)
        length, part = offsets.diff(dim=-1), 0.5 + _PLACES
        depth = _cubic((values - self.peak).clamp(min=_FLOOR), slopes, length, part)
        mass = _WEIGHTS * length * depth.exp()
        self.inner = mass.sum(0)
        """Mass of each interval, ``(d, n - 1)``, in units of the peak's density."""
        self.outer = _beyond(values[:, [0, -1]] - self.peak, slopes[:, [0, -1]], offsets[:, [0, -1]])
        """Mass beyond both ends, ``(d, 2)``."""
        self.within = within = self.inner.sum(-1, keepdim=True)
        self.mass = within + self.outer.sum(-1, keepdim=True)
        share, places = mass / within, offsets[:, :-1] + part * length
        mean = (share * places).sum((0, -1))
        variance = (share * (places - mean[:, None]).square()).sum((0, -1))
        entropy = within[:, 0].log() - (share * depth).sum((0, -1))
        self.negentropy = 0.5 * (2 * math.pi * math.e * variance).log() - entropy
        """Divergence from the normal of equal mean and variance, ``(d,)``."""

    def kept(self, which: Tensor) -> _Lines:
        """Returns the lines of a boolean choice ``(d,)``."""
        parts = (self.offsets, self.values, self.slopes)
        return _Lines(self.dims[which], self.center, *(part[which] for part in parts))

    def bent(self) -> _Lines:
        """Returns the lines with a known mass that are no normal densities."""
        known = (self.outer < _UNKNOWN * self.within).all(-1)
        return self.kept(known & (self.negentropy > _BENT))

    def quantiles(self) -> Tensor:
        """Returns standard normal places, values and slopes of the quantile functions at the nodes, ``(3, d, n)``."""
        below = torch.cat([self.outer[:, :1], self.inner], -1).cumsum(-1)
        above = torch.cat([self.inner, self.outer[:, 1:]], -1).flip(-1).cumsum(-1).flip(-1)
        lower, upper = (torch.special.ndtri(each / self.mass) for each in (below, above))
        normal = torch.where(below < above, lower, -upper)
        slope = normal.square().mul(-0.5).exp() / math.sqrt(2 * math.pi) * self.mass / (self.values - self.peak).exp()
        return torch.stack([normal, self.center[self.dims, None] + self.offsets, slope])


def _cubic(values: Tensor, slopes: Tensor, length: Tensor, part: Tensor) -> Tensor:
    """Returns cubics at parts of the intervals between nodes, between what a concave and a convex one could be."""
    low, rise = values[:, :-1], values.diff(dim=-1)
    first, last = slopes[:, :-1] * length - rise, rise - slopes[:, 1:] * length
    # All after the chord.
    ahead, behind = part * first, (1 - part) * last
    bulge = part * (1 - part) * (first * (1 - part) + last * part)
    least, most = torch.maximum(ahead, behind).clamp(max=0.0), torch.minimum(ahead, behind).clamp(min=0.0)
    return low + part * rise + torch.minimum(torch.maximum(bulge, least), most)


def _beyond(depth: Tensor, slope: Tensor, offsets: Tensor) -> Tensor:
    """Returns the mass beyond both ends ``(d, 2)`` of tails that fall like a power; infinite if that is improper."""
    fall = slope * slope.new_tensor([1.0, -1.0]) - 1 / offsets.abs()
    return torch.where(depth <= _FLOOR, 0.0, torch.where(fall > 0, depth.exp() / fall, math.inf))


def _along(safe: SafeDensity, center: Tensor, dims: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-densities and derivatives, ``(d, n)``, at offsets along the axes ``dims``."""
    count = offsets.shape[1]
    found = []
    # In parts, because each row is a whole point.
    for axes, steps in zip(*(part.split(max(1, safe.rows // count)) for part in (dims, offsets)), strict=True):
        index = axes.repeat_interleave(count)[:, None]
        points = center.expand(len(index), -1).scatter_add(-1, index, steps.reshape(-1, 1))
        value, slope = safe.gradients(points)
        found.append(torch.stack([value, slope.gather(-1, index)[:, 0]]).unflatten(1, steps.shape))
    values, slopes = torch.cat(found, 1)
    return values, slopes


def conditional_knots(
    safe: SafeDensity, center: Tensor, scale: Tensor, dtype: torch.dtype | None = None
) -> Knots | None:
    r"""Finds splines that make normal variables of latents, each given that the others are at ``center``.

    For a latent with the conditional distribution function :math:`F`, knots follow :math:`F^{-1}(\Phi(x))`. Its
    log-density and derivative are evaluated at nodes that reach to tails of :math:`10^{-7}` and close in on kinks.
    Latents with a nearly normal conditional (negentropy below 0.01 nats) have no spline.

    The cost is 11 rows with gradients for each latent, and some 100 more for each one with a spline.

    Args:
        safe: the density.
        center: a typical point, float64 on the CPU, ``(D,)``.
        scale: lower triangular factor of a covariance ``(D, D)`` or standard deviations ``(D,)``, of the right order.
        dtype: that of the spline, in which knots must differ; by default the density's.
    """
    every = torch.arange(len(center), device=center.device)
    width = torch.linalg.inv(scale).norm(dim=0).reciprocal() if scale.dim() == 2 else scale
    width = width[:, None]
    offsets = width * center.new_tensor(_FIRST)
    lines = _Lines(every, center, offsets, *_along(safe, center, every, offsets))
    lines = lines.kept((lines.outer > _MOST * lines.within).any(-1) | ~(lines.negentropy < _BENT))
    if not len(lines.dims):
        return None
    width, dims = width[lines.dims], lines.dims
    reach = _reach(safe, lines)
    turns = torch.linspace(0, 1, _MESH + 1, dtype=center.dtype, device=center.device)
    left, right = (width * torch.sinh(turns * torch.asinh(reach[:, [k]] / width)) for k in (0, 1))
    offsets = torch.cat([left.flip(-1), right[:, 1:]], -1)
    lines = _Lines(dims, center, offsets, *_along(safe, center, dims, offsets)).bent()
    for _ in range(_ROUNDS):
        if not len(lines.dims) or safe.expired:
            return None
        lines = _refined(safe, lines).bent()
    knots = _with_kinks(lines).quantiles().to(dtype or safe.dtype).double()
    fine = knots.isfinite().all(-1).all(0) & (knots[:2].diff(dim=-1) > 0).all(-1).all(0) & (knots[2] > 0).all(-1)
    # Less could not gain enough.
    return Knots(lines.dims[fine], knots[:, fine]) if lines.negentropy[fine].sum() > _GAIN else None


def _reach(safe: SafeDensity, lines: _Lines) -> Tensor:
    """Returns offsets ``(d, 2)`` beyond which little mass lies, and not so little that the density is unknown."""
    near, far = torch.zeros_like(lines.outer), torch.full_like(lines.outer, math.inf)
    trial, share = lines.offsets[:, [0, -1]].clone(), lines.outer / lines.within
    sides = trial.sign()
    for _ in range(_TRIALS):
        size = trial.abs()
        near, far = torch.where(share > _MOST, size, near), torch.where(share < _LEAST, size, far)
        open_ = ((share > _MOST) | (share < _LEAST)) & (far - near > 1e-3 * near)
        rows = open_.any(-1).nonzero()[:, 0]
        if not len(rows) or safe.expired:
            break
        fresh = sides * torch.where(far < math.inf, 0.5 * (near + far), 2 * near)
        trial = torch.where(open_, fresh, trial)
        value, slope = _along(safe, lines.center, lines.dims[rows], trial[rows])
        share[rows] = _beyond(value - lines.peak[rows], slope, trial[rows]) / lines.within[rows]
    return torch.where(share < _LEAST, sides * near, trial)


def _refined(safe: SafeDensity, lines: _Lines) -> _Lines:
    """Adds pairs of nodes where chords differ most from tangents, around the point where these meet.

    Pairs close in on kinks.
    """
    length, rise = lines.offsets.diff(dim=-1), lines.values.diff(dim=-1)
    change = lines.slopes[:, :-1] - lines.slopes[:, 1:]
    depth = torch.maximum(lines.values[:, :-1], lines.values[:, 1:]) - lines.peak
    away = (lines.slopes[:, :-1] * length - rise).abs() + (lines.slopes[:, 1:] * length - rise).abs()
    worth = away * (1 + depth / _DEEP).clamp(min=0.0)
    places = (lines.center[lines.dims, None] + lines.offsets).abs()
    rounding = 1e4 * safe.eps * torch.maximum(places[:, :-1], places[:, 1:])
    worth = torch.where(length > torch.maximum(_SHORT * lines.mass, rounding), worth, -1.0)
    index = worth.topk(_PAIRS, dim=-1).indices
    meet = ((rise / length - lines.slopes[:, 1:]) / change).gather(-1, index)
    meet = torch.where((meet > 0) & (meet < 1), meet, 0.5).clamp(0.05, 0.95)
    aside = 0.1 * torch.minimum(meet, 1 - meet)
    low, step = lines.offsets.gather(-1, index), length.gather(-1, index)
    fresh = torch.cat([low + (meet - aside) * step, low + (meet + aside) * step], -1)
    offsets, order = torch.cat([lines.offsets, fresh], -1).sort(-1)
    found = zip((lines.values, lines.slopes), _along(safe, lines.center, lines.dims, fresh), strict=True)
    return _Lines(lines.dims, lines.center, offsets, *(torch.cat(pair, -1).gather(-1, order) for pair in found))


def _with_kinks(lines: _Lines) -> _Lines:
    """Moves the nearer node of each pair that encloses a kink onto it, where tangents meet."""
    length, rise = lines.offsets.diff(dim=-1), lines.values.diff(dim=-1)
    change = lines.slopes[:, :-1] - lines.slopes[:, 1:]
    meet = (rise - lines.slopes[:, 1:] * length) / (change * length)
    enclosed = (
        (length < 2 * _SHORT * lines.mass) & (change.abs() * lines.mass > _SHARP) & (meet > 0.005) & (meet < 0.995)
    )
    dims, index = enclosed.nonzero().unbind(-1)
    meet, length, first = meet[enclosed], length[enclosed], lines.slopes[dims, index]
    offset = lines.offsets[dims, index] + meet * length
    value = lines.values[dims, index] + first * meet * length
    nearer = index + (meet > 0.5)
    moved = [part.index_put((dims, nearer), new) for part, new in ((lines.offsets, offset), (lines.values, value))]
    return _Lines(lines.dims, lines.center, moved[0], moved[1], lines.slopes)


class _Straightened:
    """A density as seen from the base side of a spline."""

    def __init__(self, density: LogDensity, spline: FixedSpline) -> None:
        self.density, self.spline, self.pace = density, spline, pace_of(density)

    def __call__(self, x: Tensor) -> Tensor:
        y, ladj = self.spline.forward_and_ladj(x)
        return self.density(y) + ladj

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y, ladj = self.spline.forward_and_ladj(x)
            value, slope = value_and_slope(self.density, y.detach())
            slope = torch.autograd.grad((y * slope).sum() + ladj.sum(), x)[0]
        return value + ladj.detach(), slope


def straight_start(
    density: LogDensity,
    initial: Tensor,
    *,
    num_starts: int = 4,
    seconds: float | None = None,
    full_rank_up_to: int = 300,
    dtype: torch.dtype | None = None,
) -> tuple[Start, Knots | None]:
    """Finds a Gaussian start, and splines at the data end of a guide if with them its ELBO is clearly higher.

    The plain start, of :func:`~pyro_flows.infer.search.start.find_start`, has three quarters of the seconds. Its
    location is the center of :func:`conditional_knots`; ``dtype`` is that of the guide.

    Returns:
        The start on the base side of the splines, and their knots; or the plain start and ``None``.
    """
    end = math.inf if seconds is None else time.monotonic() + seconds

    def left() -> float | None:
        return None if seconds is None else end - time.monotonic()

    plain = None if seconds is None else _PLAIN * seconds
    start = find_start(density, initial, num_starts=num_starts, seconds=plain, full_rank_up_to=full_rank_up_to)
    pace = pace_of(density)
    first = 0.0 if pace is None else len(_FIRST) * len(initial) * pace.seconds_per_draw
    if first > _FIRST_SHARE * (end - time.monotonic()):
        return start, None
    safe = SafeDensity(density, initial, seconds=left())
    knots = conditional_knots(safe, start.loc.double().cpu(), start.scale.double().cpu(), dtype)
    if knots is None or safe.expired:
        return start, None
    spline = FixedSpline(len(initial), knots.dims, knots.knots.to(initial.dtype)).to(initial.device)
    other = find_start(
        _Straightened(density, spline),
        spline.inverse_and_ladj(start.loc)[0],
        num_starts=1,
        seconds=left(),
        full_rank_up_to=full_rank_up_to,
    )
    return (other, knots) if other.elbo > start.elbo + _GAIN else (start, None)


def probe_behind(
    spline: FixedSpline | None,
    log_p: LogDensity,
    log_q: LogDensity,
    draws: Tensor,
    initial: Tensor,
    *,
    known: ModeProbe | None = None,
    **options: Any,
) -> ModeProbe:
    """Searches for modes by :func:`~pyro_flows.infer.search.probe.probe_modes` on the base side of a guide's spline.

    There, climbs end at maxima with a curvature also where the density has a kink.
    """
    if spline is None:
        return probe_modes(log_p, log_q, draws, initial, known=known, **options)
    inner, start = (spline.inverse_and_ladj(each.to(spline.knots))[0] for each in (draws, initial))
    if known is not None:
        known = _moved(known, *moved_with_slopes(spline.inv, known.locations))
    found = probe_modes(
        _Straightened(log_p, spline), _Straightened(log_q, spline), inner, start, known=known, **options
    )
    return _moved(found, *moved_with_slopes(spline, found.locations))


def moved_with_slopes(transform: FlowTransform, points: Tensor) -> tuple[Tensor, Tensor]:
    """Moves points ``(K, D)`` by an elementwise map; returns them and its slopes."""
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        moved = transform.forward_and_ladj(points)[0]
        (slopes,) = torch.autograd.grad(moved.sum(), points)
    return moved.detach(), slopes


def _moved(probe: ModeProbe, locations: Tensor, slopes: Tensor) -> ModeProbe:
    """Moves modes, their Gaussians as by a linear map, and their densities."""
    ladj = slopes.log().sum(-1)
    scale = slopes.unsqueeze(-1) * probe.scale
    return replace(probe, locations=locations, scale=scale, log_p=probe.log_p - ladj, log_q=probe.log_q - ladj)
