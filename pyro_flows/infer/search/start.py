"""Finds the Gaussian from which a guide starts."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from pyro_flows.core.checks import integer
from pyro_flows.infer.search.climb import LogDensity, Paths, SafeDensity, bfgs, climb, curved, diagonal_bfgs, identity
from pyro_flows.infer.search.curvature import bend, difference, first_metric, laplace, symmetric_eigen, triangular

__all__ = ["Start", "find_start"]

_PLAIN = (0.1, 0.03, 0.3, 1.0)


_BLIND = 0.1


_PER_PATH = 30


_FINALISTS = 8


_SCREEN, _FIRST, _ERRORS, _SURE, _ROUGH = 16, 12, 3.0, 0.1, 3.0


_TASTE, _REFINEMENTS, _POOR = 3, 30, 3


_FINER = 4


_STEPS, _CLIMBING = 100, 0.6


class Start(NamedTuple):
    """The Gaussian start, with the initial point's dtype and device."""

    loc: Tensor
    """Mean, shape ``(D,)``."""
    scale: Tensor
    """Lower triangular factor of the covariance ``(D, D)``, or standard deviations ``(D,)`` if dimensions are many."""
    elbo: float
    """Its ELBO in nats, from four times ``num_samples`` draws, unless time was up before."""
    evaluations: int
    """Points at which the density was evaluated."""
    kind: str
    """Its origin: ``"initial"``, ``"path"`` or ``"laplace"``, with ``"+refined"`` after a refinement."""


class _Gaussian(NamedTuple):
    loc: Tensor
    scale: Tensor
    kind: str

    def at(self, noise: Tensor) -> Tensor:
        """Maps standard normal draws ``(n, D)`` to draws of this Gaussian."""
        return self.loc + (noise @ self.scale.mT if self.scale.dim() == 2 else noise * self.scale)

    def log_size(self) -> Tensor:
        return (self.scale.diagonal() if self.scale.dim() == 2 else self.scale).log().sum()

    def usable(self, eps: float) -> bool:
        """Whether the Gaussian is finite, and wide enough that rounded draws differ."""
        sds = self.scale.diagonal() if self.scale.dim() == 2 else self.scale
        finite = self.loc.isfinite().all() and self.scale.isfinite().all() and self.log_size().isfinite()
        # On an unbounded density, draws that rounding makes equal would seem to gain forever.
        return bool(finite and (sds > 8 * eps * self.loc.abs()).all())


def find_start(
    density: LogDensity,
    initial: Tensor,
    *,
    num_starts: int = 4,
    num_samples: int = 64,
    generator: Generator | None = None,
    seconds: float | None = None,
    full_rank_up_to: int = 300,
) -> Start:
    r"""Finds a Gaussian with a high ELBO.

    The candidates are narrow Gaussians around ``initial``, Pathfinder's :math:`N(z + H g, H)` along quasi-Newton paths,
    and Laplace's at the paths' ends, ranked by their ELBOs on the same draws minus three standard errors. Natural
    gradient ascent refines the best: :math:`\Sigma^{-1} \leftarrow -\mathrm{E}_q \nabla^2 \log p`,
    :math:`\mu \leftarrow \mu + \Sigma\, \mathrm{E}_q \nabla\log p`. The expectations use pairs of points in orthogonal
    directions, and are exact for a Gaussian density.

    The cost is some tens of density calls of up to 256 points with gradients (1024 without).

    Args:
        density: the unnormalized log-density, ``(S, D)`` to ``(S,)``; NaN and errors count as ``-inf``.
        initial: a point with finite density, shape ``(D,)``, which sets the dtype and device.
        num_starts: the number of climbs, the first from ``initial``.
        num_samples: the draws per ELBO, four times as many in refinements.
        generator: the source of randomness, on the CPU.
        seconds: the wall-clock limit, checked between calls. If it ends all paths before a maximum, and no Gaussian is
            near the posterior, the highest path goes on for as long again at most. If time ends before any ranking,
            the result is the Gaussian at the end of the highest path, or a narrow one around ``initial``, with ELBO
            minus infinity.
        full_rank_up_to: the largest dimension with a full-rank scale.

    Raises:
        ValueError: if ``initial`` is not a finite vector, or no candidate has a finite ELBO.

    References:
        Zhang, Carpenter, Gelman, Vehtari: Pathfinder: Parallel quasi-Newton variational inference, arXiv:2108.03782.
        Khan, Lin: Conjugate-computation variational inference, arXiv:1703.04265.
    """
    if initial.dim() != 1 or not len(initial) or not initial.is_floating_point() or not initial.isfinite().all():
        raise ValueError(
            f"find_start: expected initial as a finite vector of shape (D,), got {initial.dtype} of shape "
            f"{tuple(initial.shape)}; give one point in unconstrained space"
        )
    integer("find_start", "num_starts", num_starts)
    integer("find_start", "num_samples", num_samples, 4)
    safe = SafeDensity(density, initial, seconds=seconds)
    center = initial.detach().double().cpu()
    full = len(center) <= full_rank_up_to
    unit = identity(center) if full else torch.ones_like(center)
    best = _Ranking(safe, _pairs(num_samples, center, generator))
    # Climbs need few points, and leave a good Gaussian if time ends before any ranking.
    found, highest = _candidates(safe, _dispersed(safe, center, num_starts, generator), full)
    best.add_all([_Gaussian(center, size * unit, "initial") for size in _PLAIN] + found)
    # A start far from the posterior costs training more than this costs the start.
    poor = safe.expired or best.winner is None or best.elbo - best.score > _ROUGH
    if poor and highest is not None and seconds is not None:
        safe.deadline = time.monotonic() + seconds
        found = _candidates(safe, highest, full)[0] + found
        best.add_all(found)
    if best.winner is None and safe.found and safe.expired:
        blind = _Gaussian(center, _BLIND * unit, "initial")
        best.winner = next((each for each in found if each.usable(safe.eps)), blind)
    if best.winner is None:
        cause = safe.error
        raise ValueError(
            f"find_start: the log-density is not finite on draws of any candidate, not even close to the initial point"
            f"{'' if cause is None else f' (the density raised {type(cause).__name__}: {cause})'}; give an initial "
            f"point inside the support with finite log-density, and look for log(0) and overflow in the model"
        ) from cause
    if not safe.expired:
        best = _refined(safe, best, _pairs(_FINER * num_samples, center, generator), generator)
    loc, scale = (part.to(initial.device, initial.dtype) for part in (best.best.loc, best.best.scale))
    return Start(loc, scale, best.elbo, safe.evaluations, best.best.kind)


class _Ranking:
    """Ranks Gaussians by their ELBO on the same draws, minus three standard errors."""

    def __init__(self, safe: SafeDensity, noise: Tensor) -> None:
        self.safe, self.noise = safe, noise
        self.winner: _Gaussian | None = None
        self.score = self.elbo = -math.inf
        self.seconds: dict[str, tuple[float, float, _Gaussian]] = {}
        """The best of each kind, after its score and its ELBO."""

    @property
    def best(self) -> _Gaussian:
        """The winner; raises without one."""
        if self.winner is None:
            raise ValueError("find_start: no candidate has a finite ELBO; give another initial point")
        return self.winner

    @property
    def sure(self) -> bool:
        """Whether the winner's log-weights hardly vary."""
        return self.elbo - self.score < _SURE

    def scores(self, candidates: list[_Gaussian], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scores and ELBOs, ``(C,)`` each, from one call; ``-inf`` where a draw's log-density is not finite."""
        points = torch.stack([candidate.at(noise) for candidate in candidates])
        values = self.safe.values(points.flatten(0, 1)).reshape(points.shape[:2])
        size = torch.stack([candidate.log_size() for candidate in candidates])
        each = values + 0.5 * (noise * noise).sum(-1) + 0.5 * noise.shape[-1] * math.log(2 * math.pi) + size[:, None]
        pairs = each.unflatten(1, (-1, 2)).mean(-1)
        elbos = pairs.mean(-1)
        scores = elbos - _ERRORS * pairs.std(-1) / math.sqrt(pairs.shape[1])
        usable = elbos.isfinite() & scores.isfinite()
        return scores.masked_fill(~usable, -math.inf), elbos.masked_fill(~usable, -math.inf)

    def add(self, candidates: list[_Gaussian]) -> None:
        """Lets the best candidate challenge the winner."""
        candidates = [candidate for candidate in candidates if candidate.usable(self.safe.eps)]
        if not candidates:
            return
        scores, elbos = (part.tolist() for part in self.scores(candidates, self.noise))
        for found in zip(scores, elbos, candidates, strict=True):
            if found[0] > self.seconds.get(found[2].kind, (-math.inf,))[0]:
                self.seconds[found[2].kind] = found
            self.take(*found)

    def take(self, score: float, elbo: float, candidate: _Gaussian) -> None:
        """Makes the candidate the winner if it scores higher."""
        if score > self.score:
            self.score, self.elbo, self.winner = score, elbo, candidate

    def add_all(self, candidates: list[_Gaussian]) -> None:
        """Screens candidates with few draws, and adds the best and the first of each kind."""
        candidates = [candidate for candidate in candidates if candidate.usable(self.safe.eps)]
        scores: list[float] = []
        while len(scores) < len(candidates) and not (scores and self.safe.expired):
            several = candidates[len(scores) : len(scores) + (64 if scores else _FIRST)]
            scores += self.scores(several, self.noise[:_SCREEN])[0].tolist()
        if not scores:
            return
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        kinds = {candidate.kind: i for i, candidate in reversed(list(enumerate(candidates)))}
        self.add([candidates[i] for i in dict.fromkeys([*order[:_FINALISTS], *kinds.values()])])
        if self.winner is None and self.safe.expired and scores[order[0]] > -math.inf:
            self.take(scores[order[0]], scores[order[0]], candidates[order[0]])


def _dispersed(safe: SafeDensity, center: Tensor, num_starts: int, generator: Generator | None) -> Tensor:
    """Returns ``center`` and nearby points with finite density, ``(S, D)``."""
    found = [center[None]]
    for width in (2.0, 0.5, 0.1):
        wanted = num_starts - sum(map(len, found))
        if wanted <= 0 or safe.expired:
            break
        spread = torch.rand(8 * num_starts, len(center), generator=generator, dtype=torch.float64, device="cpu")
        points = center + width * (2 * spread - 1)
        found.append(points[safe.values(points).isfinite()][:wanted])
    return torch.cat(found)


def _candidates(safe: SafeDensity, points: Tensor, full: bool) -> tuple[list[_Gaussian], Tensor | None]:
    """Climbs from ``points``; returns Gaussians along the paths and at their ends, the most trustworthy first.

    Also returns the highest end ``(1, D)`` if time ended all paths before a maximum.
    """
    value, slope = safe.gradients(points)
    points, slope = points[value.isfinite()], slope[value.isfinite()]
    if not len(points):
        return [], None
    metric = first_metric(safe, points, slope) if full else None
    with safe.share(_CLIMBING):
        # With a first metric, only a density without a maximum takes more steps.
        if full:
            paths = climb(safe, points, memory=None, metric=metric, steps=_STEPS)
        else:
            paths = climb(safe, points)
        cut = safe.expired and not paths.converged.any()
    ends, values, slope = paths.ends()
    order = values.argsort(descending=True)
    highest = ends[order[:1]] if cut else None
    along = [_along(paths, i, None if metric is None else metric[i]) for i in order.tolist()]
    last = [path.pop() for path in along]
    rest = [each for path in along for each in path]
    if not safe.expired and full:
        peaks = laplace(safe, ends[order], torch.stack([each.scale for each in last]))
        pairs = zip(peaks.points, peaks.scale, strict=True)
        doubted = [_Gaussian(*pair, "laplace") for pair in pairs]
        proper = [doubted.pop(i) for i in range(len(last))[::-1] if peaks.proper[i]][::-1]
        return proper + last + doubted + rest, highest
    if not safe.expired and len(points[0]) <= 4 * safe.rows:
        return _diagonal(safe, ends[order[0]], slope[order[0]], last[0]) + last + rest, highest
    return last + rest, highest


def _along(paths: Paths, i: int, metric: Tensor | None) -> list[_Gaussian]:
    """Returns Pathfinder's Gaussians along one path, thinned; the last is at its end."""
    points, slopes = paths.positions[i], paths.gradients[i]
    count = len(points)
    keep = {round(k * (count - 1) / max(1, _PER_PATH - 1)) for k in range(_PER_PATH)}
    inverse = metric
    found = []
    for k in range(count):
        if k:
            step, change = points[k] - points[k - 1], slopes[k - 1] - slopes[k]
            if curved(step, change):
                inverse = _updated(inverse, step, change)
        if k in keep or k == count - 1:
            start = inverse if inverse is not None else torch.full_like(points[k], 1e-4)
            found.append(_suggested(points[k], slopes[k], start))
    return found


def _updated(inverse: Tensor | None, step: Tensor, change: Tensor) -> Tensor:
    if inverse is None:
        inverse = (step @ change / (change @ change)).expand_as(step)
    if inverse.dim() == 2:
        return bfgs(inverse[None], step[None], change[None])[0]
    return diagonal_bfgs(inverse, step, change)


def _suggested(point: Tensor, slope: Tensor, inverse: Tensor) -> _Gaussian:
    if inverse.dim() == 2:
        move = inverse @ slope
        # Rounding can leave an inverse Hessian that Cholesky refuses.
        unit = inverse.diagonal().clamp(min=1e-300).sqrt()
        strength, axes = symmetric_eigen(inverse / unit[:, None] / unit)
        scale = triangular((unit[:, None] * axes * strength.clamp(min=1e-13).sqrt())[None])[0]
    else:
        move = inverse * slope
        scale = inverse.sqrt()
    # Distrust a model that promises this much from one step.
    return _Gaussian(point + move if move @ slope < 1e3 else point, scale, "path")


def _diagonal(safe: SafeDensity, point: Tensor, slope: Tensor, last: _Gaussian) -> list[_Gaussian]:
    """Returns Laplace's Gaussian from the Hessian's diagonal."""
    curvature = []
    short = difference(safe) * last.scale
    for axes in torch.diag(short).split(max(1, safe.rows // 2)):
        curvature.append(bend(safe, point[None], slope[None], axes.mT[None])[0].diagonal())
    precision = torch.cat(curvature).abs() / (short * short)
    floor = 1e-8 * precision.amax()
    return [_Gaussian(point, precision.clamp(min=floor).rsqrt(), "laplace")] if floor > 0 else []


def _pairs(count: int, like: Tensor, generator: Generator | None) -> Tensor:
    """Draws standard normals in pairs of opposite sign, which cancel the mean's error to first order."""
    half = torch.randn((count + 1) // 2, len(like), generator=generator, dtype=torch.float64, device="cpu")
    return torch.stack([half, -half], 1).flatten(0, 1)


def _refined(safe: SafeDensity, best: _Ranking, noise: Tensor, generator: Generator | None) -> _Ranking:
    """Refines the best of each kind, since the present winner may lose."""
    final = _Ranking(safe, noise)
    for _, _, candidate in best.seconds.values():
        other = _Ranking(safe, noise)
        other.add([candidate])
        if other.winner is not None:
            _refine(safe, other, _TASTE, generator)
            final.take(other.score, other.elbo, other.winner)
    if final.winner is None:
        return best
    _refine(safe, final, _REFINEMENTS, generator)
    return final


def _refine(safe: SafeDensity, best: _Ranking, rounds: int, generator: Generator | None) -> None:
    rate, sets, poor = 1.0, 1, 0
    for _ in range(rounds):
        current, before = best.best, best.score
        expected = None if safe.expired else _expected(safe, current, sets, generator)
        if expected is None or safe.expired:
            return
        sizes = (1.0,) if best.sure else (1.0, 0.4, 0.15, 0.05)
        best.add([_stepped(current, *expected, size * rate) for size in sizes])
        if best.score - before > 0.02:
            rate, poor = min(1.0, 1.5 * rate), 0
            continue
        settled = bool((expected[0].abs() < 1e-3).all() and best.score - before < 1e-4)
        # Far from a Gaussian, expectations are noisy: take more points and shorter steps.
        rate, sets, poor = 0.5 * rate, min(4, 2 * sets), poor + 1
        if poor >= _POOR or settled:
            return


def _expected(
    safe: SafeDensity, current: _Gaussian, sets: int, generator: Generator | None
) -> tuple[Tensor, Tensor] | None:
    r"""Returns the expected gradient ``(D,)`` and curvature ``(D, D)``, or its diagonal, in the Gaussian's units.

    Stein: :math:`\mathrm{E}\nabla^2\log p = \mathrm{E}[\nabla\log p\, \epsilon^\top]`, with :math:`\epsilon = \pm r q`
    along orthogonal :math:`q`. Drawing :math:`r` from chi with ``D + 2`` degrees of freedom cancels :math:`r^2`, so the
    average is exact for Gaussians.
    """
    dim = len(current.loc)
    if current.scale.dim() == 2:
        sets = sets * -(-64 // dim)
        normal = torch.randn(sets, dim, dim, generator=generator, dtype=torch.float64, device="cpu")
        across = torch.linalg.qr(normal)[0].mT.flatten(0, 1)
    else:
        signs = torch.randint(2, (64 * sets, dim), generator=generator, device="cpu").double()
        across = (2 * signs - 1) / math.sqrt(dim)
    shape = (len(across), dim + 2)
    length = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").norm(dim=-1, keepdim=True)
    ends = torch.stack([current.at(length * across), current.at(-length * across)])
    value, slope = safe.gradients(ends.flatten(0, 1))
    fine = value.isfinite().reshape(2, -1).all(0)
    if fine.double().mean() < 0.8:
        return None
    slope = slope.reshape(ends.shape)
    slope = slope @ current.scale if current.scale.dim() == 2 else slope * current.scale
    weight = fine[:, None] * dim / length**2
    push = (weight * slope.mean(0)).sum(0) / weight.sum()
    change = torch.where(fine[:, None], (slope[1] - slope[0]) / (2 * length), across)
    if current.scale.dim() == 2:
        turned = change.mT @ across / sets
        return push, 0.5 * (turned + turned.mT)
    return push, (change * across).mean(0) * dim


def _stepped(current: _Gaussian, push: Tensor, turned: Tensor, rate: float) -> _Gaussian:
    """Takes a natural gradient step that changes the precision at most tenfold."""
    kind = current.kind if current.kind.endswith("+refined") else f"{current.kind}+refined"
    if turned.dim() == 1:
        precision = 1 - rate + rate * turned.clamp(0.1, 10.0)
        return _Gaussian(current.loc + rate * current.scale * push / precision, current.scale * precision.rsqrt(), kind)
    strength, axes = symmetric_eigen(turned)
    precision = 1 - rate + rate * strength.clamp(0.1, 10.0)
    frame = current.scale @ axes
    loc = current.loc + rate * frame @ ((push @ axes) / precision)
    return _Gaussian(loc, triangular((frame * precision.rsqrt())[None])[0], kind)
