"""Judges a fitted flow."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.chains import BaseDensity
from pyro_flows.infer.diagnostics import (
    Importance,
    Verdict,
    Walk,
    compare_moments,
    importance,
    judge,
    walk_draws,
    widening,
)
from pyro_flows.infer.guides.modes import base_draws
from pyro_flows.infer.guides.posterior import spline_of
from pyro_flows.infer.machine.pace import Pace, pace_of
from pyro_flows.infer.models.joint import FAILURES
from pyro_flows.infer.models.latents import Latents
from pyro_flows.infer.search.climb import LogDensity
from pyro_flows.infer.search.conditionals import probe_behind
from pyro_flows.infer.search.probe import ModeProbe, nothing_found

__all__ = ["Assessment", "Weighed", "assess", "scores", "weigh"]

CHUNK = 1000
DRAWS = 10_000
FEWEST = 1000
SEARCHED = 2000  # dimensions up to which matrices of a search for modes fit into memory
WALKERS, MOVES = (512, 256, 128), 30
SEVERAL_MOVES, LEAPS = 6, 6  # the fewest moves of a walk, and the evaluations of a move
SEARCHING, THOROUGH = 0.6, 0.8  # part of the time after the draws, and of time that training did not need
AGAIN = 0.4  # part of the last search's time for which another is worth while
CONSTANT = 0.02  # spread of log-weights
STARTS = 64, 128  # of a search, and of a thorough one
ROUNDS = 16, 1024  # of candidates for its starts, and if time ends them


@dataclass(frozen=True)
class Assessment:
    """Draws of a flow, their densities under model and flow, and the verdict.

    Example:
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = pf.fit_guide(model, torch.tensor(2.0), steps=20)
        >>> fit.assessment.draws.shape
        torch.Size([10000, 1])
    """

    draws: Tensor
    """Unconstrained, ``(n, D)``."""
    log_p: Tensor
    """The model's log joint density, ``(n,)``."""
    log_q: Tensor
    """The flow's log-density, ``(n,)``."""
    importance: Importance
    """All numbers about the weights."""
    probe: ModeProbe | None
    """The search for modes, if there was one."""
    walk: Walk | None
    """The walk of weighted draws, if there was one."""
    verdict: Verdict
    """Whether the flow can be trusted."""

    @property
    def log_weights(self) -> Tensor:
        """The log-weights ``log_p - log_q``, shape ``(n,)``."""
        return self.log_p - self.log_q


class Weighed(NamedTuple):
    """Draws of a flow with their log-densities."""

    base: Tensor
    """Draws of the base, ``(n, D)``."""
    draws: Tensor
    """Their images, ``(n, D)``."""
    log_p: Tensor
    """The model's log-density there, ``(n,)``; NaN where it raises."""
    log_q: Tensor
    """The flow's, ``(n,)``."""

    @property
    def log_weights(self) -> Tensor:
        """``log_p - log_q``."""
        return self.log_p - self.log_q


@torch.no_grad()
def weigh(flow: Flow, density: LogDensity, num_samples: int, deadline: float = math.inf, scale: float = 1.0) -> Weighed:
    """Draws from a flow and scores the draws; fewer, at least one, after a deadline of ``time.monotonic()``.

    A ``scale`` widens the base, and log q with it.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    left = num_samples
    while left > 0 and (not parts or time.monotonic() < deadline):
        count = min(CHUNK, left)
        x, log_base = base_draws(flow, count, scale)
        z, ladj = flow.chain.forward_and_ladj(x)
        log_q = log_base - ladj
        log_p = scores(density, z, deadline)
        count = len(log_p)
        parts.append((x[:count], z[:count], log_p.to(z.dtype), log_q[:count]))
        left -= CHUNK
    return Weighed(*map(torch.cat, zip(*parts, strict=True)))


def scores(density: LogDensity, z: Tensor, deadline: float) -> Tensor:
    """Returns log-densities of points ``(S, D)``, NaN where the model raises; after a deadline, of fewer."""
    pace = pace_of(density) or Pace()
    parts: list[Tensor] = []
    first, alone = 0, 0  # rows up to ``alone`` go one at a time
    while first < len(z) and (not parts or time.monotonic() < deadline):
        count = 1 if first < alone else pace.at_once(len(z) - first, timed=deadline < math.inf)
        part = z[first : first + count]
        try:
            with pace.call(count):
                parts.append(density(part))
        except FAILURES:
            if count > 1:
                alone = first + count
                continue
            parts.append(z.new_full((1,), math.nan))
        first += count
    return torch.cat(parts)


def assess(
    flow: Flow,
    density: LogDensity,
    latents: Latents,
    initial: Tensor,
    *,
    minibatch: bool = False,
    num_samples: int = DRAWS,
    seconds: float = math.inf,
    search_seconds: float = math.inf,
    thorough: bool = False,
    walk_seconds: float = math.inf,
    walk_evaluations: float = math.inf,
    known: ModeProbe | None = None,
    generator: Generator | None = None,
) -> Assessment:
    """Judges a flow by draws, weights, moments, a wider guide, a walk of the weighted draws and a search for modes.

    Four tenths of ``seconds`` are for draws (more if too short for a thousand). The rest is for the wider guide; for
    the search, which has at most ``search_seconds``, and begins with ``known`` modes; and for the walk, which has at
    most ``walk_seconds``, and ``walk_evaluations`` of the density with its gradient.
    """
    begin = time.monotonic()
    pace = pace_of(density) or Pace()
    # If time is short, draws come first, because few say little.
    part = 0.4 if 0.4 * seconds >= min(num_samples, FEWEST) * pace.seconds_per_draw else 0.8
    drawn = weigh(flow, density, num_samples, begin + part * seconds)
    x, z, log_p, log_q = drawn
    log_weights = drawn.log_weights
    found = importance(log_weights)
    if minibatch or not (log_weights.isfinite().sum() >= 2):
        return Assessment(z, log_p, log_q, found, None, None, judge(found, minibatch=minibatch, asked=num_samples))
    fine = z.isfinite().all(-1)
    moments = compare_moments(latents.draws(z[fine]), log_weights[fine])
    wide_count = max(min(len(z), 2000), 1)
    wider = weigh(flow, density, wide_count, begin + (part + 0.1) * seconds, scale=widening(z.shape[-1]))
    wide = importance(wider.log_weights)
    left = min((THOROUGH if thorough else SEARCHING) * (begin + seconds - time.monotonic()), search_seconds)
    end, took = time.monotonic() + left, 0.0
    probe = nothing_found(z)
    while left > AGAIN * took and math.isfinite(found.log_evidence) and len(initial) <= SEARCHED:
        probe = known = probe_behind(
            spline_of(flow),
            density,
            flow.log_prob,
            z[fine],
            initial,
            log_evidence=found.log_evidence,
            log_weights=log_weights[fine],
            num_starts=STARTS[thorough],
            num_rounds=ROUNDS[seconds < math.inf],
            known=known,
            generator=generator,
            seconds=None if left == math.inf else left,
        )
        # Others follow, with other starts, while there is time, if time is limited.
        took, left = left - (end - time.monotonic()), end - time.monotonic()
        if seconds == math.inf or probe.missing_share > 0 or not probe.complete:
            break
    left = min(begin + seconds - time.monotonic(), walk_seconds)
    if probe is not None and probe.missing_share > 0 and seconds < math.inf:
        left = 0.0  # time to add the modes says more
    walked = _walk(flow, density, x[fine], log_weights[fine], pace, left, walk_evaluations, generator)
    verdict = judge(found, probe, moments=moments, wide=wide, walk=walked, asked=num_samples)
    return Assessment(z, log_p, log_q, found, probe, walked, verdict)


def _walk(
    flow: Flow,
    density: LogDensity,
    x: Tensor,
    log_weights: Tensor,
    pace: Pace,
    seconds: float,
    evaluations: float,
    generator: Generator | None,
) -> Walk | None:
    """Walks with as many walkers as make several moves in the time.

    ``None`` if even few walkers would not, or if weights are constant.
    """
    if seconds <= 0:
        return None
    affordable = min(evaluations, seconds / pace.seconds_per_draw if pace.seconds_per_draw else math.inf)
    most = affordable / LEAPS
    walkers = next((count for count in WALKERS if most / count >= SEVERAL_MOVES), None)
    if walkers is None or log_weights.double().std() < CONSTANT or not (log_weights > -math.inf).any():
        return None
    return walk_draws(
        BaseDensity(flow, density),
        x,
        log_weights,
        num_walkers=walkers,
        num_moves=min(MOVES, int(most / walkers)),
        generator=generator,
        seconds=None if seconds == math.inf else seconds,
    )
