"""Choices of ``fit_guide`` by model speed and time limit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Generator, Tensor

from pyro_flows.infer.diagnostics import importance
from pyro_flows.infer.guides.assessment import FEWEST, ROUNDS, SEARCHED, scores, weigh
from pyro_flows.infer.guides.auto import AutoFlow
from pyro_flows.infer.guides.cover import mixture_draws
from pyro_flows.infer.guides.posterior import affine_of, preconditioner_of, spline_of
from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.pace import FLAT, rows_at_once
from pyro_flows.infer.models.joint import FAILURES, JointDensity
from pyro_flows.infer.search.climb import LogDensity
from pyro_flows.infer.search.conditionals import probe_behind
from pyro_flows.infer.search.probe import ModeProbe

__all__ = [
    "SEARCHING",
    "SEVERAL",
    "SLOW_SECONDS",
    "choose_particles",
    "moved_to_mode",
    "seconds_for_verdict",
    "several_modes",
    "start_weights",
    "start_within",
]

PARTICLES = 128  # draws per step
FEW_PARTICLES = 32  # where the structure of the model leaves little to learn, more steps serve better
SLOW_PARTICLES = 8  # for a model that runs one draw at a time
SLOW_SECONDS = 40.0  # for slow models
LONG = 0.03  # seconds of a call that matter
ASSESSING = 0.13  # least share of the verdict's seconds
SLOW_ASSESSING = 0.4
SEARCHING = 0.1  # share of the seconds for a search for modes before training
ERRORS = 2.0  # standard errors by which a later state must not fall below the start
SHORT, SUFFICIENT = 0.15, 0.6  # the same share of few seconds, up to so many
ANOTHER = 0.05  # most part of the time left for another search
EVEN = 0.05  # spread of log-weights at the start that needs no training
MOVING, CLEARLY = 128, 1.0  # draws for an ELBO of the start, and nats that make one clearly higher
SEVERAL = 0.01  # share of outside modes that is worth another start


@contextmanager
def start_within(guide: AutoFlow, seconds: float | None) -> Iterator[None]:
    """Limits the seconds for building the guide."""
    own = guide.start_seconds
    if seconds is not None:
        guide.start_seconds = seconds if own is None else min(own, seconds)
    try:
        yield
    finally:
        guide.start_seconds = own


@torch.no_grad()
def choose_particles(guide: AutoFlow, density: JointDensity, initial: Tensor, seconds: float | None) -> int:
    """Returns the guide's draws per step, or as many as suit the model's speed."""
    asked, most = guide.num_particles, PARTICLES if guide.structure is None else FEW_PARTICLES
    z = initial.expand(most, -1)
    if asked is None:
        z = z + 0.01 * torch.randn_like(z)
    pace = density.pace
    try:
        if seconds is None:
            density(z[:2])  # finds out whether it broadcasts
        while seconds is not None and density.many_at_once:
            rows = pace.at_once(most, timed=True)
            with pace.call(rows):
                density(z[:rows])
            if pace.at_once(most, timed=True) <= rows:
                break
    except FAILURES:  # training can handle these
        return asked or most
    if asked is not None:
        return asked
    if seconds is not None:
        affordable = max(LONG, FLAT * pace.shortest, 0.005 * seconds) / max(pace.seconds_per_draw, 1e-9)
        sizes = (most, FEW_PARTICLES, SLOW_PARTICLES, 4) if density.many_at_once else (SLOW_PARTICLES, 4)
        return next((size for size in sizes if size <= affordable), 2)
    if not density.many_at_once:
        return SLOW_PARTICLES
    if most == FEW_PARTICLES:
        return most
    times = {PARTICLES: math.inf, FEW_PARTICLES: math.inf}
    for count in (*times, *times):
        start = time.monotonic()
        for part in z[:count].split(rows_at_once(density, count)):
            density(part)
        times[count] = min(times[count], time.monotonic() - start)
    many, few = times.values()
    # If time grows with the draws and steps are slow, fewer draws give more steps.
    return FEW_PARTICLES if many > LONG and many > 2 * few else PARTICLES


def start_weights(guide: AutoFlow, density: JointDensity) -> tuple[bool, float]:
    """Returns whether weights at the start are so even that training adds noise only, and a lower bound of their ELBO.

    Of a guide with the model's structure, else false and minus infinity.
    """
    if guide.structure is None or guide.subsampled or guide.start == "prior" or guide.tempering is not None:
        return False, -math.inf
    log_weights = weigh(guide.flow, density, FEW_PARTICLES * 2).log_weights.double()
    spread = float(log_weights.std())
    level = float(log_weights.mean()) - ERRORS * spread / math.sqrt(len(log_weights))
    return spread < EVEN, level if math.isfinite(level) else -math.inf  # false for NaN


def seconds_for_verdict(density: JointDensity, budget: Budget, searched: bool) -> float:
    """Returns the seconds for judging a thousand draws, within bounds; more if no search for modes is complete yet."""
    seconds = budget.seconds
    if seconds is None:
        return 0.0
    need = 2.5 * FEWEST * density.pace.seconds_per_draw
    least = ASSESSING * seconds
    if not searched:
        least += min(SEARCHING * seconds, ANOTHER * budget.left())
    return min(max(need, least), SLOW_ASSESSING * seconds)


def moved_to_mode(guide: AutoFlow, density: JointDensity, probe: ModeProbe) -> bool:
    """Moves the affine map to the Gaussian on the largest mode, if the ELBO of a start cut short is lower than its."""
    affine = preconditioner_of(guide.flow)
    if guide.structure is not None or spline_of(guide.flow) is not None or not len(probe.share):
        return False

    def elbo() -> float:
        return float(weigh(affine_of(guide.flow), density, MOVING).log_weights.nan_to_num(nan=-math.inf).mean())

    before, (loc, scale) = elbo(), (affine.loc.clone(), affine.scale.clone())
    k = int(probe.share.argmax())
    affine.place(probe.locations[k], probe.scale[k] if affine.full else probe.scale[k].norm(dim=-1))
    better = elbo() > before + CLEARLY
    if not better:
        affine.place(loc, scale)
    return better


def several_modes(
    guide: AutoFlow, density: JointDensity, initial: Tensor, budget: Budget, generator: Generator
) -> ModeProbe | None:
    """Searches for modes outside the start, if there is time."""
    if guide.subsampled or guide.start == "prior" or guide.tempering is not None or len(initial) > SEARCHED:
        return None
    seconds = math.inf if budget.seconds is None else budget.seconds
    seconds = max(SEARCHING * seconds, min(SHORT * seconds, SUFFICIENT))
    if seconds < max(10 * density.pace.shortest, 100 * density.pace.seconds_per_draw):
        return None  # too short to find anything
    end = time.monotonic() + min(seconds, SLOW_SECONDS / 2)
    start = affine_of(guide.flow) if guide.structure is None else guide.flow
    count = min(max(256, 4 * len(initial)), 1200) if density.many_at_once else 64  # enough for a covariance
    drawn = weigh(start, density, count, math.inf if budget.seconds is None else end)
    evidence = importance(drawn.log_weights).log_evidence
    if not math.isfinite(evidence) or len(drawn.draws) < 2:
        return None
    fine = drawn.draws.isfinite().all(-1)
    z, weights = drawn.draws[fine], drawn.log_weights[fine]
    log_q_of: LogDensity = start.log_prob
    probe, before = None, 0.0
    for _ in range(2):
        seconds = end - time.monotonic()
        if seconds <= 0:
            break
        probe = probe_behind(
            spline_of(guide.flow),
            density,
            log_q_of,
            z,
            initial,
            log_evidence=evidence,
            log_weights=weights,
            num_starts=32 if density.many_at_once else 8,
            num_rounds=ROUNDS[budget.seconds is not None],
            known=probe,
            generator=generator,
            seconds=None if budget.seconds is None else seconds,
        )
        before = 1 - (1 - before) * (1 - probe.missing_share)
        if probe.missing_share <= SEVERAL or before > probe.missing_share or end - time.monotonic() < 0.5 * seconds:
            break
        # Narrow modes hide behind wide ones that the start misses: another look, from the Gaussians on all of them.
        z, mixture = mixture_draws(probe, count, generator)
        log_q_of, evidence = mixture.log_prob, evidence - math.log1p(-probe.missing_share)
        log_p = scores(density, z, math.inf if budget.seconds is None else end)
        z = z[: len(log_p)]
        weights = log_p - log_q_of(z)
    return None if probe is None else replace(probe, missing_share=before)
