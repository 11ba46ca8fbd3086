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
SCREENED = 64  # candidates for a far start
SCREENING = 0.2  # most part of the time
RADII = (3.0, 1000.0)  # of far starts
NEAR = (0.5, 4.0)  # standard deviations of screened starts within the guide
KINDS = 5


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
) -> StartingPoints:
    r"""Finds starts inside the guide, near it, near ``initial``, and at all scales up to 1000.

    - 16 of the guide's draws, picked by weight, since draws without weight are not of the posterior; and the four of
      the largest weights, which a mode that the guide hardly reaches may have caused.
    - ``initial``, and the reflections of the guide's mean through it and the origin, for symmetric likelihoods.
    - A quarter of ``num_starts``: overdispersed draws, 2 to 5 of the guide's standard deviations wide.
    - A quarter: around ``initial``, alternately uniform in :math:`(-2, 2)^D` and five times wider.
    - Half: at radii log-uniform from 3 to 1000, in turn around ``initial``; around the guide's mean, in its standard
      deviations; along one coordinate from one of its draws, in either unit; along a diagonal, of equal or random
      signs; and in every fifth place draws from half to four of the guide's standard deviations wide, where narrow
      modes may be.  Radii around a point grow with :math:`\sqrt D / 2`, as the part along any one way falls.  Each is
      the best of 64 candidates a round by :math:`\log p - \log N`, with a Gaussian :math:`N` like the guide, which
      points to where the guide does not draw.

    Args:
        safe: the density.
        draws: draws of the guide, ``(n, D)``, finite.
        log_weights: their log-weights, ``(n,)``; none for equal ones.
        initial: the point from which fitting began, ``(D,)``.
        frame: the scale of the guide's draws, ``(D, D)``, triangular.
        num_starts: the number of starts outside of the guide.
        num_rounds: the rounds of candidates for far starts; they end early at a fifth of the time.
        generator: the source of randomness, on the CPU.
    """
    rand = Uniforms(generator)
    mean, size, dim = draws.mean(0), draws.std(0), draws.shape[1]
    quarter = num_starts // 4
    wide = (2 + 3 * rand(TRIES * quarter, 1)) * rand.normal(TRIES * quarter, dim)
    uniform = 4 * rand(TRIES * quarter, dim) - 2
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
        (initial + uniform, quarter, False),
    ):
        points = points[safe.values(points).isfinite()][:wanted]
        found.append(points)
        inside += [mine] * len(points)
    screened = _Far(own, mean, size, initial, frame, num_starts - 2 * quarter, rand)
    with safe.share(SCREENING):
        for _ in range(num_rounds):
            screened.screen(safe)
    far = screened.best[screened.score > -math.inf]
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


class _Far:
    """Far starts, each the best of its candidates so far."""

    def __init__(
        self, own: Tensor, mean: Tensor, size: Tensor, initial: Tensor, frame: Tensor, count: int, rand: Uniforms
    ) -> None:
        self.own, self.mean, self.size, self.initial, self.frame, self.rand = own, mean, size, initial, frame, rand
        self.best = mean.expand(count, -1).clone()
        self.score = mean.new_full((count,), -math.inf)

    def _candidates(self) -> Tensor:
        """Returns points ``(starts, 64, D)``, each start with its own stratum of radii."""
        count, dim = self.best.shape
        each = -(-count // KINDS)
        low, high = map(math.log, RADII)
        part = torch.arange(each, dtype=torch.float64, device="cpu")[:, None] + self.rand(each, SCREENED)
        radius = (low + (high - low) * part / each).exp()[..., None]
        width = NEAR[0] + (NEAR[1] - NEAR[0]) * part / each
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
            self.mean + width[..., None] * self.rand.normal(*shape) @ self.frame.mT,
        ]
        return torch.stack(kinds, 1).flatten(0, 1)[:count]

    def screen(self, safe: SafeDensity) -> None:
        """Tries another round of candidates, if there is time."""
        if safe.expired or not len(self.best):
            return
        tried = self._candidates()
        values = safe.values(tried.flatten(0, 1)).reshape(tried.shape[:2])
        away = torch.linalg.solve_triangular(self.frame, (tried - self.mean).flatten(0, 1).mT, upper=False)
        score = torch.where(values.isfinite(), values + 0.5 * away.square().sum(0).reshape(values.shape), -math.inf)
        score, place = score.max(1)
        better = score > self.score
        self.best[better] = tried[better, place[better]]
        self.score[better] = score[better]
