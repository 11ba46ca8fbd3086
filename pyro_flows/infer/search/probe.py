"""Searches for modes that a guide's own draws cannot show."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from pyro_flows.core.checks import integer
from pyro_flows.infer.search.climb import LogDensity, SafeDensity, climb, identity
from pyro_flows.infer.search.curvature import Peaks, laplace, shortened, triangular
from pyro_flows.infer.search.starting_points import starting_points

__all__ = ["ModeProbe", "nothing_found", "probe_modes"]

_STEPS, _CAUTION = 200, 0.1  # of a climb; size of the first step of starts from outside
_DENSE, _FRAMED = 50, 300  # dimensions up to which inverse Hessians, and the guide's scale, are matrices
_MODES, _TOGETHER = 12, 8  # modes at most, and those whose curvatures are computed at once
_SAMPLES = 512  # for a mode's mass
_CLIMBING = 0.75  # share of the seconds for starts and climbs
_FEWEST, _CLIMB = 16, 200  # starts of a short search; evaluations, without gradients, that take the time of a climb
_PROMISE = 4.0  # nats of a first step
_LOOKED, _MOST = 20, 0.8  # steps of a climb that has looked, and the share of climbs that must have
_LONG, _ENOUGH = 30, 1.0  # steps after which climbs end once this share of them has
_GRACE = 0.5  # share of the seconds for curvatures and masses, if need be beyond these
_PER_DIM, _SPREAD = 4, (2000, 5)  # draws by dimensions that give a scale; those that are used, and more by dimensions
_NEAR = 0.01  # between ends of one mode
_DEEP = 25.0  # nats by dimensions below the evidence; a mode would be e^24 wide to count
_LEAST_SHARE, _LEAST_PART = 1e-3, 0.1  # of a missed mode; of its mass in the guide


@dataclass(frozen=True)
class ModeProbe:
    """The modes that ``probe_modes`` found, best first, with the draws' dtype and device.

    Example:
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = pf.fit_guide(model, torch.tensor(2.0), steps=20)
        >>> fit.assessment.probe.locations.round(decimals=2)
        tensor([[1.]])
    """

    locations: Tensor
    """Maxima of the log-density, ``(K, D)``."""
    scale: Tensor
    """Cholesky factors of Laplace's Gaussians there, ``(K, D, D)``."""
    log_p: Tensor
    """Log-density there, not normalized, in nats, ``(K,)``."""
    log_q: Tensor
    """The guide's log-density there, ``(K,)``."""
    excess: Tensor
    """``log_p - log_evidence - log_q``: near 0 at a mode that the guide covers, ``(K,)``."""
    share: Tensor
    """Share of the posterior's mass around each, missed modes' mass counted in, ``(K,)``."""
    guide_share: Tensor
    """Share of the guide's mass in the same place, ``(K,)``."""
    missed: Tensor
    """Whether the guide misses the mode, with at most a tenth of the mass there and no draws that lead to it."""
    missing_share: float
    """Sum of the missed modes' shares, 0 where nothing is missed."""
    evaluations: int
    """Points at which the model's density was evaluated."""
    complete: bool
    """Whether four fifths of the climbs ended or took 20 steps in time; if not, missing nothing says little."""
    num_starts: int
    """Points from which climbs ended or took 20 steps in time, with those of an earlier search."""
    reach: float
    """The largest distance of a start from ``initial``."""


def probe_modes(
    log_p: LogDensity,
    log_q: LogDensity,
    draws: Tensor,
    initial: Tensor,
    *,
    log_evidence: float,
    log_weights: Tensor | None = None,
    num_starts: int = 64,
    num_rounds: int = 4,
    known: ModeProbe | None = None,
    generator: Generator | None = None,
    seconds: float | None = None,
) -> ModeProbe:
    r"""Climbs the posterior from many points and compares the guide's density with the model's at the maxima.

    Half of the starts are near the guide and ``initial``, half at radii log-uniform from 3 to 1000
    (:func:`~pyro_flows.infer.search.starting_points.starting_points`). Climbs from the guide's own draws, picked by
    weight, show its basins. Ends without curvature in all directions (a funnel's neck) are not modes.

    The mass around a mode comes from importance sampling from its slightly widened Laplace Gaussian :math:`\ell`:
    :math:`m_p = \mathrm{E}_\ell[p / \ell]`, and :math:`m_q` for the guide. A mode is missed if

    - its share :math:`m_p / (Z + \text{mass missed})` is above 0.001,
    - the guide has less than a tenth of it, :math:`m_q < m_p / (10 Z)`, and
    - fewer climbs from the guide's draws, picked by weight, end there than a tenth of its share would have.

    A heavy tail or a curved posterior fails the last condition.

    Args:
        log_p: the model's unnormalized log-density, ``(S, D)`` to ``(S,)``; refused points count as ``-inf``.
        log_q: the guide's normalized log-density.
        draws: at least two draws of the guide, ``(n, D)``.
        initial: the point from which fitting began, ``(D,)``.
        log_evidence: the guide's estimate of :math:`\log Z`, its ELBO or, better, by importance sampling.
        log_weights: log-weights of the draws, ``(n,)``. Without them, draws of weight zero between two modes may climb
            to one that the guide misses, and hide it.
        num_starts: the number of climbs from outside of the guide.
        num_rounds: the rounds of candidates, without gradients, for those of them that start far away.
        known: an earlier search of the same density, whose modes are judged again. If it was complete, then this one
            is, too, even if time ends its climbs.
        generator: the source of randomness, on the CPU.
        seconds: the wall-clock limit, checked between calls, after which modes are left out. If it is short for a
            model of known :class:`~pyro_flows.infer.machine.pace.Pace`, fewer starts climb, 16 at least, of all kinds.

    Raises:
        ValueError: for other shapes, an evidence that is not finite, or a density that is finite nowhere.
    """
    if draws.dim() != 2 or len(draws) < 2 or initial.shape != draws.shape[1:]:
        raise ValueError(
            "probe_modes: expected draws of shape (n, D) with n >= 2 and initial of shape (D,), got "
            f"{tuple(draws.shape)} and {tuple(initial.shape)}"
        )
    integer("probe_modes", "num_starts", num_starts)
    if not math.isfinite(log_evidence):
        raise ValueError(f"probe_modes: expected a finite log_evidence, got {log_evidence}; estimate it from the draws")
    safe = SafeDensity(log_p, draws, seconds=seconds)
    guide = SafeDensity(log_q, draws)
    own = draws.detach().double().cpu()
    whole = own.isfinite().all(-1)
    own = own[whole]
    weights = None if log_weights is None else log_weights.detach().double().cpu()[whole]
    spread = _spread(own)
    with safe.share(_CLIMBING):
        around = initial.detach().double().cpu()
        places, again = None, known is not None and known.complete
        if known is not None:
            locations, scale, share = (x.detach().double().cpu() for x in (known.locations, known.scale, known.share))
            places = locations, scale, share
        starts = starting_points(
            safe, own, weights, around, spread, num_starts, num_rounds, generator, known=places, again=again
        )
        points, inside = starts.points, starts.inside
        if not len(points) and safe.pace is not None and safe.expired:
            return nothing_found(draws, safe.evaluations)
        if not len(points):
            raise ValueError(
                "probe_modes: log_p is not finite at any start, not even at the guide's own draws; look at the fit and "
                "at the model's density first"
            ) from safe.error
        climbs = _climbed(safe, points, inside, spread)
    if seconds is not None:  # a mode without a mass would not count
        safe.deadline = time.monotonic() + _GRACE * seconds
    peaks, basin = _peaks(safe, climbs, spread, log_evidence - _DEEP * len(initial), _known(known))
    climbed = not safe.expired and bool(climbs.looked.double().mean() >= _MOST)
    q_there = guide.values(peaks.points)
    mass_p, mass_q = _masses(safe, guide, peaks, generator)
    missed, share, rest = _judged(mass_p - log_evidence, mass_q.exp(), basin)
    # Modes that an earlier search found are judged again without new climbs; time may have ended before.
    complete = bool(mass_p.isfinite().all()) and (climbed or (known is not None and known.complete))

    def like(part: Tensor) -> Tensor:
        return part.to(draws.device, draws.dtype)

    return ModeProbe(
        locations=like(peaks.points),
        scale=like(peaks.scale),
        log_p=like(peaks.values),
        log_q=like(q_there),
        excess=like(peaks.values - log_evidence - q_there),
        share=like(share),
        guide_share=like(mass_q.exp().clamp(max=1.0)),
        missed=missed.to(draws.device),
        missing_share=rest,
        evaluations=safe.evaluations,
        complete=complete,
        num_starts=int(climbs.looked.sum()) + (0 if known is None else known.num_starts),
        reach=max(starts.reach, 0.0 if known is None else known.reach),
    )


def nothing_found(draws: Tensor, evaluations: int = 0) -> ModeProbe:
    """Returns the result of a search without time."""
    none, dim = draws.new_zeros(0), draws.shape[-1]
    places = none.reshape(0, dim), none.reshape(0, dim, dim)
    return ModeProbe(*places, none, none, none, none, none, none.bool(), 0.0, evaluations, False, 0, 0.0)


def _spread(own: Tensor) -> Tensor:
    """Returns the scale of the guide's draws, ``(D, D)``, diagonal for few draws and in many dimensions."""
    own = own[: _SPREAD[0] + _SPREAD[1] * own.shape[1]]
    count, dim = own.shape
    centered = own - own.mean(0)
    size = centered.square().mean(0).clamp(min=1e-24).sqrt()
    if count < _PER_DIM * dim or dim > _FRAMED:
        return torch.diag(size)
    ridge = 1e-4 * identity(own)
    frame = torch.cat([centered / size / math.sqrt(count), ridge]).mT
    return size[:, None] * triangular(frame[None])[0]


class _Climbs(NamedTuple):
    """The ends of climbs."""

    ends: Tensor
    """``(S, D)``."""
    values: Tensor
    """Log-densities there, ``(S,)``."""
    converged: Tensor
    """Whether these are maxima, ``(S,)``."""
    looked: Tensor
    """Whether they are, or so many steps were taken that the climb is on a ridge without an end, as in a funnel."""
    inside: Tensor
    """Whether the climb began at a draw of the guide, ``(S,)``."""


def _climbed(safe: SafeDensity, points: Tensor, inside: Tensor, spread: Tensor) -> _Climbs:
    """Climbs from all points, or from as many of all kinds as there is time for."""
    count, dim = points.shape
    if safe.deadline is not None and safe.pace is not None and safe.pace.seconds_per_draw:
        affordable = (safe.deadline - time.monotonic()) / (_CLIMB * safe.pace.seconds_per_draw)
        rows = torch.linspace(0, count - 1, min(count, max(_FEWEST, int(affordable))), device="cpu").long()
        points, inside = points[rows], inside[rows]
    # A full Newton step of the guide's size would carry every start into the guide's own mode.
    size = torch.where(inside, 1.0, _CAUTION)[:, None].double()
    if dim <= _DENSE:
        options: Any = {"memory": None, "metric": size[..., None] * (spread @ spread.mT), "exact": False}
    elif dim <= _FRAMED:
        options = {"memory": 10, "metric": size.expand(-1, dim), "frame": spread}
    else:
        options = {"memory": 10, "metric": size * spread.diagonal().square()}
    paths = climb(safe, points, steps=_STEPS, enough=(_ENOUGH, _LONG), promise=_PROMISE, **options)
    taken = torch.tensor([len(path) for path in paths.values], device="cpu")
    looked = paths.converged | (taken > _LOOKED)
    return _Climbs(*paths.ends()[:2], paths.converged, looked, inside)


def _peaks(
    safe: SafeDensity, climbs: _Climbs, spread: Tensor, least: float, known: list[Peaks]
) -> tuple[Peaks, Tensor]:
    """Returns distinct maxima above the ``least`` value, best first, and the share of the draws that lead there."""
    ends, values, converged, inside = climbs.ends, climbs.values, climbs.converged, climbs.inside
    order = values.masked_fill(~converged, -torch.inf).argsort(descending=True).tolist()
    free = converged & (values > least)
    found: list[Peaks] = []
    shares: list[float] = []

    def add(peak: Peaks) -> None:
        away = torch.linalg.solve_triangular(peak.scale[0], (ends - peak.points).mT, upper=False).square().sum(0)
        # An end this near and this high is the same maximum.
        same = (away < 1.0) & ((values - peak.values).abs() < 1.0 + 64 * safe.eps * peak.values.abs())
        free[same] = False
        if not any(_same(peak, other) for other in found):
            found.append(peak)
            shares.append(float((same & inside).sum()) / max(1, int(inside.sum())))

    for peak in known:
        add(peak)
    apart = torch.linalg.solve_triangular(spread, ends.mT, upper=False).mT
    while free.any() and len(found) < _MODES and not safe.expired:
        rows: list[int] = []
        for i in order:
            if not free[i] or len(rows) == _TOGETHER:
                continue
            # Climbs that end at the same place.
            free[((apart - apart[i]).norm(dim=-1) < _NEAR) & ((values - values[i]).abs() < _NEAR)] = False
            rows.append(i)
        peaks = shortened(safe, laplace(safe, ends[rows], spread.expand(len(rows), -1, -1), rounds=8))
        for k in range(len(rows)):
            if peaks.proper[k] and len(found) < _MODES:
                add(peaks.chosen(slice(k, k + 1)))
    if not found:
        dim = ends.shape[-1]
        none = ends.new_zeros(0)
        return Peaks(none.reshape(0, dim), none, none.reshape(0, dim, dim), none.bool()), none
    best = torch.cat([peak.values for peak in found]).argsort(descending=True)
    return Peaks(*map(torch.cat, zip(*found, strict=True))).chosen(best), ends.new_tensor(shares)[best]


def _known(probe: ModeProbe | None) -> list[Peaks]:
    if probe is None:
        return []
    points, values, scale = (part.detach().double().cpu() for part in (probe.locations, probe.log_p, probe.scale))
    peaks = Peaks(points, values, scale, torch.ones_like(values, dtype=torch.bool))
    return [peaks.chosen(slice(k, k + 1)) for k in range(len(points))]


def _same(one: Peaks, other: Peaks) -> bool:
    away = torch.linalg.solve_triangular(other.scale[0], (one.points - other.points).mT, upper=False)
    return bool(away.square().sum() < 1.0)


def _masses(safe: SafeDensity, guide: SafeDensity, peaks: Peaks, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Returns log masses of the model and the guide around each peak, ``(K,)`` each."""
    count, dim = peaks.points.shape
    noise = torch.randn(_SAMPLES, dim, generator=generator, dtype=torch.float64, device="cpu")
    # In many dimensions, wider proposals would make an exact Gaussian's weights uneven.
    wider = 1 + min(0.2, 0.5 / math.sqrt(dim))
    constant = dim * math.log(wider) + 0.5 * dim * math.log(2 * math.pi) - math.log(_SAMPLES)
    size = constant + peaks.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    where = peaks.points[:, None] + wider * (noise @ peaks.scale.mT)
    # Each point counts for the peak to which it belongs: a wide one would else claim a part of its neighbor.
    size = size[:, None] + 0.5 * (noise * noise).sum(-1) + _belonging(peaks, where)
    logs = [density.values(where.flatten(0, 1)).reshape(count, _SAMPLES) + size for density in (safe, guide)]
    return logs[0].logsumexp(-1), logs[1].logsumexp(-1)


def _belonging(peaks: Peaks, where: Tensor) -> Tensor:
    """Returns log-probabilities, by the Gaussians, that points ``(K, S, D)`` belong to their own peak, ``(K, S)``."""
    if len(where) < 2:
        return torch.zeros_like(where[..., 0])
    away = (where[:, None] - peaks.points[:, None]).mT
    away = torch.linalg.solve_triangular(peaks.scale, away, upper=False).square().sum(-2)
    each = peaks.values[:, None] - 0.5 * away
    own = torch.arange(len(where), device=where.device)
    return each[own, own] - each.logsumexp(1)


def _judged(log_part: Tensor, guide_share: Tensor, basin: Tensor) -> tuple[Tensor, Tensor, float]:
    """Returns missed modes, shares, and the missed sum, from masses over the evidence."""
    part = log_part.clamp(max=600.0).exp()
    passed = (guide_share < _LEAST_PART * part) & (basin < _LEAST_PART * part.clamp(max=1.0))
    total = 1 + part[passed].sum()
    missed = passed & (part / total > _LEAST_SHARE)
    total = 1 + part[missed].sum()
    # Importance sampling may find slightly more than all the mass around a covered mode.
    share = torch.where(missed, part, part.clamp(max=1.0)) / total
    return missed, share, float(share[missed].sum())
