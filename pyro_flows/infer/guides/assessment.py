"""Judges a fitted flow."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.diagnostics import Importance, Verdict, compare_moments, importance, judge, widening
from pyro_flows.infer.machine.pace import Pace, pace_of
from pyro_flows.infer.models.joint import FAILURES
from pyro_flows.infer.models.latents import Latents
from pyro_flows.infer.search.climb import LogDensity
from pyro_flows.infer.search.probe import ModeProbe, nothing_found, probe_modes

__all__ = ["Assessment", "assess", "weigh"]

CHUNK = 1000
DRAWS = 10_000
FEWEST = 1000
SEARCHED = 2000  # dimensions up to which matrices of a search for modes fit into memory


@dataclass(frozen=True)
class Assessment:
    """Draws of a flow, their densities under model and flow, and the verdict."""

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
    verdict: Verdict
    """Whether the flow can be trusted."""

    @property
    def log_weights(self) -> Tensor:
        """The log-weights ``log_p - log_q``, shape ``(n,)``."""
        return self.log_p - self.log_q


@torch.no_grad()
def weigh(
    flow: Flow, density: LogDensity, num_samples: int, deadline: float = math.inf, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns draws of the flow, log p and log q; fewer, at least one, after a deadline of ``time.monotonic()``.

    Where the model raises, log p is NaN. A ``scale`` widens the base, and log q with it.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    left = num_samples
    while left > 0 and (not parts or time.monotonic() < deadline):
        count = min(CHUNK, left)
        x = flow.base().sample((count,))
        z, ladj = flow.chain.forward_and_ladj(x * scale)
        log_q = flow.base().log_prob(x) - x.shape[-1] * math.log(scale) - ladj
        log_p = _scores(density, z, deadline)
        parts.append((z[: len(log_p)], log_p.to(z.dtype), log_q[: len(log_p)]))
        left -= count
    z, log_p, log_q = (torch.cat(part) for part in zip(*parts, strict=True))
    return z, log_p, log_q


def _scores(density: LogDensity, z: Tensor, deadline: float) -> Tensor:
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
    known: ModeProbe | None = None,
    generator: Generator | None = None,
) -> Assessment:
    """Judges a flow by draws, weights, moments, a wider guide and a search for modes.

    Half of ``seconds`` is for draws (more if too short for a thousand). The rest is for the wider guide and the search,
    which takes at most ``search_seconds``, and begins with ``known`` modes.
    """
    begin = time.monotonic()
    pace = pace_of(density) or Pace()
    # If time is short, draws come first, because few say little.
    part = 0.5 if 0.5 * seconds >= min(num_samples, FEWEST) * pace.seconds_per_draw else 0.8
    z, log_p, log_q = weigh(flow, density, num_samples, begin + part * seconds)
    log_weights = log_p - log_q
    found = importance(log_weights)
    if minibatch or not (log_weights.isfinite().sum() >= 2):
        return Assessment(z, log_p, log_q, found, None, judge(found, minibatch=minibatch, asked=num_samples))
    fine = z.isfinite().all(-1)
    moments = compare_moments(latents.draws(z[fine]), log_weights[fine])
    wide_count = max(min(len(z), 2000), 1)
    _, wide_p, wide_q = weigh(flow, density, wide_count, begin + (part + 0.15) * seconds, scale=widening(z.shape[-1]))
    wide = importance(wide_p - wide_q)
    left = min(begin + seconds - time.monotonic(), search_seconds)
    probe = nothing_found(z)
    if left > 0 and math.isfinite(found.log_evidence) and len(initial) <= SEARCHED:
        probe = probe_modes(
            density,
            flow.log_prob,
            z[fine],
            initial,
            log_evidence=found.log_evidence,
            known=known,
            generator=generator,
            seconds=None if left == math.inf else left,
        )
    verdict = judge(found, probe, moments=moments, wide=wide, asked=num_samples)
    return Assessment(z, log_p, log_q, found, probe, verdict)
