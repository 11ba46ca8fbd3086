"""Looking for modes that a guide never visits, which no number made of its own draws can see."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from pyro_flows.infer.search.climb import LogDensity, SafeDensity, climb, identity
from pyro_flows.infer.search.curvature import Peaks, laplace, triangular

__all__ = ["ModeProbe", "nothing_found", "probe_modes"]

_STEPS, _CAUTION = 100, 0.1


_DENSE, _TRIES = 300, 4


_MODES = 12


_SAMPLES = 512


_BASIN = 16


_LEAST_SHARE, _LEAST_PART = 1e-3, 0.1


class ModeProbe(NamedTuple):
    """What :func:`probe_modes` found, best mode first; tensors have the dtype and the device of the draws."""

    locations: Tensor
    """Maxima of the log-density, ``(K, D)``."""
    scale: Tensor
    """Cholesky factors of the Gaussians of Laplace there, ``(K, D, D)``."""
    log_p: Tensor
    """Log-density there, not normalised, in nats, ``(K,)``."""
    log_q: Tensor
    """The guide's log-density there, ``(K,)``."""
    excess: Tensor
    """``log_p - log_evidence - log_q``: near 0 at a mode that the guide covers, ``(K,)``."""
    share: Tensor
    """Share of the posterior's mass around each, missed modes' mass counted in, ``(K,)``."""
    guide_share: Tensor
    """Share of the guide's mass in the same place, ``(K,)``."""
    missed: Tensor
    """Whether the guide passes it over: it has a tenth of its mass there at most, and no draws that lead to it."""
    missing_share: float
    """Sum of the missed modes' shares: 0 where nothing is missed."""
    evaluations: int
    """Points at which the model's density was evaluated."""
    complete: bool
    """Whether the search ended before its time was up; if not, that nothing is missed says little."""


def probe_modes(
    log_p: LogDensity,
    log_q: LogDensity,
    draws: Tensor,
    initial: Tensor,
    *,
    log_evidence: float,
    starts: int = 32,
    generator: Generator | None = None,
    max_seconds: float | None = None,
) -> ModeProbe:
    r"""Climbs the posterior from all over and holds the guide's density against the model's at the tops.

    Half of the starts are overdispersed draws around the guide's own, 2 to 5 of its standard deviations wide; the
    others are around ``initial``, uniform in :math:`(-2, 2)^D` and five times wider in turns.  Reflections of the
    guide's mean through the origin and through ``initial`` are tried too, as likelihoods are often symmetric, and
    climbs from the guide's own draws tell in which basins it lives.  Ends without curvature in all directions (the neck
    of a funnel, an end that runs off) are no modes.

    The mass around a mode is measured by importance sampling from its Gaussian of Laplace :math:`\ell`, made a little
    wider: :math:`m_p = \mathrm{E}_\ell[p / \ell]` and likewise the guide's :math:`m_q`.  A mode is missed if

    - its share :math:`m_p / (Z + \text{mass missed})` is above 0.001,
    - the guide has less than a tenth of it there, :math:`m_q < m_p / (10 Z)`, and
    - fewer of the climbs from the guide's own draws end there than a tenth of its share would have.

    A heavy tail or a curved posterior, which its Gaussian describes badly, fails the last condition: the guide's draws
    climb to its only top.

    Args:
        log_p: the model's log-density, ``(S, D)`` to ``(S,)``, differentiable, not normalised; points that it refuses
            count as ``-inf``.
        log_q: the guide's normalised log-density, ``(S, D)`` to ``(S,)``.
        draws: draws of the guide, ``(n, D)``, two at least.
        initial: the point from which fitting began, ``(D,)``.
        log_evidence: the guide's estimate of the log of :math:`Z`, e.g. its ELBO or, better, by importance sampling.
        starts: dispersed climbs; the guide's draws and the reflections come on top.
        generator: source of randomness, on the CPU; ``None`` is torch's own.
        max_seconds: wall-clock limit, looked at between calls; modes not looked at by then are left out.

    Raises:
        ValueError: for draws or an initial point of another shape, an evidence that is not finite, or a density that is
            finite nowhere.
    """
    if draws.dim() != 2 or len(draws) < 2 or initial.shape != draws.shape[1:] or starts < 1:
        raise ValueError(
            f"probe_modes: expected draws of shape (n, D) with n >= 2, initial of shape (D,) and starts >= 1, got "
            f"{tuple(draws.shape)}, {tuple(initial.shape)} and {starts}"
        )
    if not math.isfinite(log_evidence):
        raise ValueError(f"probe_modes: expected a finite log_evidence, got {log_evidence}; estimate it from the draws")
    safe = SafeDensity(log_p, draws, max_seconds=max_seconds)
    guide = SafeDensity(log_q, draws)
    own = draws.detach().double().cpu()
    own = own[own.isfinite().all(-1)]
    spread = _spread(own)
    points, inside = _starts(safe, own, initial.detach().double().cpu(), starts, generator)
    dense = points.shape[-1] <= _DENSE
    if not len(points) and safe.pace is not None and safe.expired:
        return nothing_found(draws, safe.evaluations)
    if not len(points):
        raise ValueError(
            "probe_modes: log_p is not finite at any start, not even at the guide's own draws; look at the fit and at "
            "the model's density first"
        ) from safe.error
    # A full Newton step of the guide's size would carry all over into the guide's own mode.
    size = torch.where(inside, 1.0, _CAUTION)[:, None, None]
    metric = size * (spread @ spread.mT)
    paths = climb(safe, points, memory=None if dense else 10, metric=metric, max_steps=_STEPS)
    peaks, basin = _peaks(safe, *paths.ends()[:2], paths.converged, spread, inside)
    complete = not safe.expired
    q_there = guide.values(peaks.points)
    mass_p, mass_q = _masses(safe, guide, peaks, generator)
    missed, share, rest = _judged(mass_p - log_evidence, mass_q.exp(), basin)

    def like(part: Tensor) -> Tensor:
        return part.to(draws.device, draws.dtype)

    excess = peaks.values - log_evidence - q_there
    answer = [
        like(part)
        for part in (peaks.points, peaks.scale, peaks.values, q_there, excess, share, mass_q.exp().clamp(max=1.0))
    ]
    return ModeProbe(*answer, missed.to(draws.device), rest, safe.evaluations, complete)


def nothing_found(draws: Tensor, evaluations: int = 0) -> ModeProbe:
    """A search that came to nothing in its time."""
    none, dim = draws.new_zeros(0), draws.shape[-1]
    return ModeProbe(
        locations=none.reshape(0, dim),
        scale=none.reshape(0, dim, dim),
        log_p=none,
        log_q=none,
        excess=none,
        share=none,
        guide_share=none,
        missed=none.bool(),
        missing_share=0.0,
        evaluations=evaluations,
        complete=False,
    )


def _spread(own: Tensor) -> Tensor:
    """Scale of the guide's draws, ``(D, D)``: of their covariance if they are many enough, else of each dimension."""
    count, dim = own.shape
    centred = own - own.mean(0)
    size = centred.square().mean(0).clamp(min=1e-24).sqrt()
    if count <= 4 * dim:
        return torch.diag(size)
    ridge = 1e-4 * identity(own)
    frame = torch.cat([centred / size / math.sqrt(count), ridge]).mT
    return size[:, None] * triangular(frame[None])[0]


def _starts(
    safe: SafeDensity, own: Tensor, initial: Tensor, starts: int, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """Finite starting points ``(S, D)``, and which of them are the guide's own draws."""
    mean, size = own.mean(0), own.std(0)
    around, elsewhere = starts - starts // 2, starts // 2
    normal = torch.randn(_TRIES * around, len(mean), generator=generator, dtype=torch.float64, device="cpu")
    wide = 2 + 3 * torch.rand(_TRIES * around, 1, generator=generator, dtype=torch.float64, device="cpu")
    uniform = 4 * torch.rand(_TRIES * elsewhere, len(mean), generator=generator, dtype=torch.float64, device="cpu") - 2
    uniform[1::2] *= 5
    picked = own[:: max(1, len(own) // _BASIN)][:_BASIN]
    mirrored = torch.stack([-mean, 2 * initial - mean, initial])
    found, inside = [], []
    for points, wanted, mine in (
        (picked, _BASIN, True),
        (mirrored, 3, False),
        (mean + wide * size * normal, around, False),
        (initial + uniform, elsewhere, False),
    ):
        points = points[safe.values(points).isfinite()][:wanted]
        found.append(points)
        inside += [mine] * len(points)
    return torch.cat(found), torch.tensor(inside, dtype=torch.bool, device="cpu")


def _peaks(
    safe: SafeDensity, ends: Tensor, values: Tensor, converged: Tensor, spread: Tensor, inside: Tensor
) -> tuple[Peaks, Tensor]:
    """Different maxima among the ends, best first, and the share of the guide's draws that lead to each."""
    order = values.masked_fill(~converged, -torch.inf).argsort(descending=True).tolist()
    free = converged & values.isfinite()
    found, shares = [], []
    for i in order:
        if not free[i]:
            continue
        if len(found) == _MODES or safe.expired:
            break
        peak = laplace(safe, ends[i : i + 1], spread[None], rounds=8)
        free[i] = False
        if not peak.proper[0]:
            continue
        away = torch.linalg.solve_triangular(peak.scale[0], (ends - peak.points).mT, upper=False).square().sum(0)
        # An end this near, and as high, is the same top: no two maxima lie within a standard deviation.
        same = (away < 1.0) & ((values - peak.values).abs() < 1.0 + 64 * safe.eps * peak.values.abs())
        free &= ~same
        if any(_same(peak, other) for other in found):
            continue
        found.append(peak)
        shares.append(float((same & inside).sum()) / max(1, int(inside.sum())))
    if not found:
        dim = ends.shape[-1]
        none = ends.new_zeros(0)
        return Peaks(none.reshape(0, dim), none, none.reshape(0, dim, dim), none.reshape(0, dim), none.bool()), none
    return Peaks(*(torch.cat(part) for part in zip(*found, strict=True))), ends.new_tensor(shares)


def _same(one: Peaks, other: Peaks) -> bool:
    away = torch.linalg.solve_triangular(other.scale[0], (one.points - other.points).mT, upper=False)
    return bool(away.square().sum() < 1.0)


def _masses(safe: SafeDensity, guide: SafeDensity, peaks: Peaks, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Logs of the mass of the model's density and of the guide's around each peak, ``(K,)`` each."""
    count, dim = peaks.points.shape
    noise = torch.randn(_SAMPLES, dim, generator=generator, dtype=torch.float64, device="cpu")
    # As wide as keeps the weights of an exact Gaussian even: their variance grows with the dimension.
    wider = 1 + min(0.2, 0.5 / math.sqrt(dim))
    constant = dim * math.log(wider) + 0.5 * dim * math.log(2 * math.pi) - math.log(_SAMPLES)
    size = constant + peaks.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    where = peaks.points[:, None] + wider * (noise @ peaks.scale.mT)
    logs = []
    for density in (safe, guide):
        values = density.values(where.flatten(0, 1)).reshape(count, _SAMPLES)
        logs.append((values + 0.5 * (noise * noise).sum(-1)).logsumexp(-1) + size)
    return logs[0], logs[1]


def _judged(log_part: Tensor, guide_share: Tensor, basin: Tensor) -> tuple[Tensor, Tensor, float]:
    """Which are missed, shares, and the sum of those missed, from masses in units of the evidence as it is known."""
    part = log_part.clamp(max=600.0).exp()
    passed = (guide_share < _LEAST_PART * part) & (basin < _LEAST_PART * part.clamp(max=1.0))
    total = 1 + part[passed].sum()
    missed = passed & (part / total > _LEAST_SHARE)
    total = 1 + part[missed].sum()
    # Around a mode that is covered importance sampling may find a little more than all there is.
    share = torch.where(missed, part, part.clamp(max=1.0)) / total
    return missed, share, float(share[missed].sum())
