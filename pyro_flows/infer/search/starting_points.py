"""Points from which a search for modes climbs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from pyro_flows.infer.search.climb import SafeDensity

__all__ = ["StartingPoints", "starting_points"]

OWN, HEAVIEST = 16, 4  # draws of the guide: picked by weight, and those of the largest weights
TRIES = 4  # candidates for a near start, as some may have no density
SCREENED, DENSELY = 64, 1024  # candidates a round for a far start, and for one within the guide's reach
SCREENING, AGAIN = (0.1, 0.3), (0.1, 0.7)  # most part of the time for either; after a search that was complete
RADII = (3.0, 1000.0)  # of far starts
WITHIN = (0.7, 4.0)  # the guide's standard deviations, for starts where narrow modes may be
KINDS, HALVES = 4, 2
MATRICES = 50  # dimensions up to which known modes are told apart


class StartingPoints(NamedTuple):
    """Points with a finite density, float64 on the CPU."""

    points: Tensor
    """``(S, D)``."""
    inside: Tensor
    """Which are draws of the guide, picked by weight, ``(S,)``."""
    reach: float
    """The largest distance from the initial point."""


def starting_points(
    safe: SafeDensity,
    draws: Tensor,
    log_weights: Tensor | None,
    initial: Tensor,
    frame: Tensor,
    num_starts: int,
    num_rounds: int = 4,
    generator: Generator | None = None,
    *,
    known: tuple[Tensor, Tensor, Tensor] | None = None,
    again: bool = False,
) -> StartingPoints:
    r"""Finds starts inside the guide, near it, near ``initial``, and at all scales up to 1000.

    - 16 of the guide's draws, picked by weight, since draws without weight are not of the posterior; and the four of
      the largest weights, which a mode that the guide hardly reaches may have caused.
    - ``initial``, and the reflections of the guide's mean through it and the origin, for symmetric likelihoods.
    - A quarter of ``num_starts``: overdispersed draws, 2 to 5 of the guide's standard deviations wide.
    - An eighth: around ``initial``, alternately uniform in :math:`(-2, 2)^D` and five times wider.
    - Three eighths: at radii log-uniform from 3 to 1000, in turn around ``initial``; around the guide's mean, in its
      standard deviations; along one coordinate from one of its draws, in either unit; and along a diagonal, of equal or
      random signs.  Radii around a point grow with :math:`\sqrt D / 2`, as the part along any one way falls.
    - A quarter: draws 0.7 to 4 of the guide's standard deviations wide, where narrow modes may be, by distance and by
      quarters of the space, so that one wide mode outside of the guide is not the best everywhere.

    Each of the last two kinds is the best of 64 and of about 256 candidates a round by :math:`\log p - \log N`, with a
    Gaussian :math:`N` like the guide, which points to where the guide does not draw. With ``known`` modes, :math:`N` is
    a mixture with the Gaussians on them, lest a narrow one that is known hide another.

    Args:
        safe: the density.
        draws: draws of the guide, ``(n, D)``, finite.
        log_weights: their log-weights, ``(n,)``; none for equal ones.
        initial: the point from which fitting began, ``(D,)``.
        frame: the scale of the guide's draws, ``(D, D)``, triangular.
        num_starts: the number of starts outside of the guide.
        num_rounds: the rounds of candidates for either kind; they end early after a tenth and three tenths of the time.
        generator: the source of randomness, on the CPU.
        known: locations ``(K, D)``, triangular scales ``(K, D, D)`` and shares ``(K,)`` of known modes, which count in
            up to 50 dimensions.
        again: whether a complete search went before, so that starts within the guide's reach may take seven tenths.
    """
    rand = Uniforms(generator)
    mean, size, dim = draws.mean(0), draws.std(0), draws.shape[1]
    quarter, eighth = num_starts // 4, num_starts // 8
    wide = (2 + 3 * rand(TRIES * quarter, 1)) * rand.normal(TRIES * quarter, dim)
    uniform = 4 * rand(TRIES * eighth, dim) - 2
    uniform[1::2] *= 5
    heaviest = draws[:0]
    if log_weights is not None:
        heaviest = draws[log_weights.nan_to_num(-math.inf).topk(min(HEAVIEST, len(draws))).indices]
    found: list[Tensor] = []
    inside: list[bool] = []
    own = _picked(draws, log_weights, rand)
    for points, wanted, mine in (
        (own, OWN, True),
        (torch.stack([-mean, 2 * initial - mean, initial]), 3, False),
        (heaviest, HEAVIEST, False),
        (mean + size * wide, quarter, False),
        (initial + uniform, eighth, False),
    ):
        points = points[safe.values(points).isfinite()][:wanted]
        found.append(points)
        inside += [mine] * len(points)
    reference = _Reference(mean, frame, known if dim <= MATRICES else None)
    screens = _Far(own, size, initial, reference, 3 * eighth, rand), _Within(reference, quarter, rand)
    for screen, part in zip(screens, AGAIN if again else SCREENING, strict=True):
        with safe.share(part):
            for _ in range(num_rounds):
                screen.screen(safe)
    far = torch.cat([screen.best[screen.score > -math.inf] for screen in screens])
    points = torch.cat([*found, far])
    inside += [False] * len(far)
    reach = float((points - initial).norm(dim=-1).max()) if len(points) else 0.0
    return StartingPoints(points, torch.tensor(inside, dtype=torch.bool, device="cpu"), reach)


class Uniforms:
    """Random numbers of a search, float64 on the CPU."""

    def __init__(self, generator: Generator | None) -> None:
        self.generator = generator

    def __call__(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")


def _picked(draws: Tensor, log_weights: Tensor | None, rand: Uniforms) -> Tensor:
    """Returns draws picked by weight, systematically."""
    if log_weights is None:
        return draws[:: max(1, len(draws) // OWN)][:OWN]
    reached = log_weights.nan_to_num(-math.inf, -math.inf, -math.inf).softmax(0).cumsum(0)
    at = (torch.arange(OWN, dtype=torch.float64, device="cpu") + rand(1)) / OWN
    return draws[torch.searchsorted(reached, at).clamp(max=len(draws) - 1)]


class _Reference:
    """A Gaussian like the guide's draws, mixed with those on known modes."""

    def __init__(self, mean: Tensor, frame: Tensor, known: tuple[Tensor, Tensor, Tensor] | None) -> None:
        self.mean, self.frame = mean, frame
        self.parts = [(mean, frame, 0.0)]
        if known is not None:
            self.parts += [(*part[:2], float(part[2].log())) for part in zip(*known, strict=True) if part[2] > 0]

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log-densities ``(n,)``, but for a constant."""
        found = []
        for loc, scale, share in self.parts:
            away = torch.linalg.solve_triangular(scale, (z - loc).mT, upper=False)
            found.append(share - scale.diagonal().log().sum() - 0.5 * away.square().sum(0))
        return torch.stack(found).logsumexp(0)


class _Screen:
    """Starts, each the best of its candidates so far."""

    def __init__(self, reference: _Reference, count: int, rand: Uniforms) -> None:
        self.reference, self.mean, self.frame, self.rand = reference, reference.mean, reference.frame, rand
        self.best = self.mean.expand(count, -1).clone()
        self.score = self.mean.new_full((count,), -math.inf)

    def _candidates(self) -> tuple[Tensor, Tensor]:
        """Returns points ``(n, D)``, and the start to which each belongs, ``(n,)``."""
        raise NotImplementedError

    def screen(self, safe: SafeDensity) -> None:
        """Tries another round of candidates, if there is time."""
        if safe.expired or not len(self.best):
            return
        tried, start = self._candidates()
        values = safe.values(tried)
        score = torch.where(values.isfinite(), values - self.reference.log_prob(tried), -math.inf)
        self.score, before = self.score.scatter_reduce(0, start, score, "amax"), self.score
        better = (score == self.score[start]) & (score > before[start])
        self.best[start[better]] = tried[better]


class _Far(_Screen):
    def __init__(
        self, own: Tensor, size: Tensor, initial: Tensor, reference: _Reference, count: int, rand: Uniforms
    ) -> None:
        super().__init__(reference, count, rand)
        self.own, self.size, self.initial = own, size, initial

    def _candidates(self) -> tuple[Tensor, Tensor]:
        count, dim = self.best.shape
        each = -(-count // KINDS)
        low, high = map(math.log, RADII)
        part = torch.arange(each, dtype=torch.float64, device="cpu")[:, None] + self.rand(each, SCREENED)
        radius = (low + (high - low) * part / each).exp()[..., None]
        around = radius * max(1.0, 0.5 * math.sqrt(dim))
        shape = each, SCREENED, dim
        ways = [way / way.norm(dim=-1, keepdim=True) for way in (self.rand.normal(*shape), self.rand.normal(*shape))]
        signs, axis = self.rand.normal(*shape).sign(), self.rand.normal(*shape)
        signs[:, ::2] = signs[:, ::2, :1]  # all alike
        axis = torch.where(axis.abs() == axis.abs().amax(-1, keepdim=True), axis.sign(), 0.0)
        axis[:, ::2] *= self.size
        base = self.own[(len(self.own) * self.rand(each, SCREENED)).long().clamp(max=len(self.own) - 1)]
        kinds = [
            self.initial + around * ways[0],
            self.mean + around * ways[1] @ self.frame.mT,
            base + radius * axis,
            self.initial + radius * signs / math.sqrt(dim),
        ]
        start = torch.arange(count, device="cpu").repeat_interleave(SCREENED)
        return torch.stack(kinds, 1).flatten(0, 1)[:count].flatten(0, 1), start


class _Within(_Screen):
    def __init__(self, reference: _Reference, count: int, rand: Uniforms) -> None:
        super().__init__(reference, count, rand)
        self.halves = min(HALVES, len(self.mean))
        self.ways = rand.normal(len(self.mean), self.halves)

    def _candidates(self) -> tuple[Tensor, Tensor]:
        count, dim = self.best.shape
        widths = max(1, count >> self.halves)
        part = torch.arange(widths, dtype=torch.float64, device="cpu")[:, None] + self.rand(widths, DENSELY)
        low, high = map(math.log, WITHIN)
        way = self.rand.normal(widths, DENSELY, dim)
        side = ((way @ self.ways > 0) * 2 ** torch.arange(self.halves, device="cpu")).sum(-1)
        start = torch.arange(widths, device="cpu")[:, None] + widths * side
        tried = self.mean + (low + (high - low) * part / widths).exp()[..., None] * way @ self.frame.mT
        return tried.flatten(0, 1), start.flatten().remainder(count)
