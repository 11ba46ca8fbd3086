"""Begins a guide with a mixture of Gaussians on several modes."""

from __future__ import annotations

import math
import time

import torch
from torch import Generator, Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.chains.walkers import Gaussians
from pyro_flows.infer.diagnostics import importance
from pyro_flows.infer.guides.assessment import FEWEST, weigh
from pyro_flows.infer.guides.auto import AutoFlow
from pyro_flows.infer.guides.loop import CLIP, speeds_of
from pyro_flows.infer.guides.modes import ModesBase
from pyro_flows.infer.guides.posterior import preconditioner_of, spline_of
from pyro_flows.infer.machine.budget import Budget, cosine
from pyro_flows.infer.machine.optimizers import AdamW
from pyro_flows.infer.search.climb import LogDensity
from pyro_flows.infer.search.conditionals import moved_with_slopes
from pyro_flows.infer.search.probe import ModeProbe

__all__ = ["add_modes", "cover_modes", "mixture_draws"]

DRAWS, BATCH, STEPS = 4096, 256, 600
RATES = (1e-2, 1e-4)
LEAST = 0.003  # least share of a mode in the start
EVEN = 0.2  # effective part of draws of the mixture that makes it the base


def mixture_draws(probe: ModeProbe, count: int, generator: Generator | None = None) -> tuple[Tensor, Gaussians]:
    """Draws ``(count, D)`` from the Gaussians on all modes but the smallest; returns these, too."""
    kept = probe.share > LEAST
    share = probe.share[kept] / probe.share[kept].sum()
    mixture = Gaussians(probe.locations[kept], probe.scale[kept], share)
    return mixture.sample(count, generator), mixture


def cover_modes(
    guide: AutoFlow,
    density: LogDensity,
    probe: ModeProbe,
    generator: Generator | None = None,
    seconds: float | None = None,
) -> int:
    """Makes the guide's flow the mixture; returns the number of modes.

    The base of a dense flow that is affine so far becomes the mixture. If the mixture is far from the posterior, as for
    maxima along a curve, or the flow has the model's structure, a flow with a normal base is fitted to it by maximum
    likelihood instead.
    """
    draws, mixture = mixture_draws(probe, DRAWS, generator)
    preconditioner, spline = preconditioner_of(guide.flow), spline_of(guide.flow)
    inner = draws if spline is None else spline.inverse_and_ladj(draws)[0]
    centered = inner - inner.mean(0)
    covariance = centered.mT @ centered / len(draws)
    if preconditioner.full:
        outer = torch.linalg.cholesky(covariance + 1e-10 * torch.diag(covariance.diagonal()))
    else:
        outer = covariance.diagonal().sqrt()
    preconditioner.place(inner.mean(0), outer)
    end = time.monotonic() + (math.inf if seconds is None else seconds)
    if guide.structure is None:
        loc, scale = mixture.locations, mixture.scale
        if spline is not None:
            loc, slopes = moved_with_slopes(spline.inv, loc)
            scale = slopes.unsqueeze(-1) * scale
        outer = outer if preconditioner.full else torch.diag(outer)
        loc = torch.linalg.solve_triangular(outer, (loc - inner.mean(0)).mT, upper=False).mT
        scale = torch.linalg.solve_triangular(outer, scale, upper=False)
        base = ModesBase(loc.shape[1], len(loc)).to(loc).place(loc, scale, mixture.share)
        flow = Flow(guide.flow.chain, base).train(guide.flow.training)
        if importance(weigh(flow, density, FEWEST, end).log_weights).ess > EVEN:
            guide.flow = flow
            return len(loc)
    _fit(guide.flow, draws, generator, None if seconds is None else max(0.0, end - time.monotonic()))
    return len(mixture.share)


def add_modes(guide: AutoFlow, probe: ModeProbe) -> int:
    """Adds the modes that a guide without a structure misses to its base; returns their number, 0 if that fails.

    There, each is the Gaussian on the mode, moved by the flow's inverse as by its linear map at the mode. The rest of
    the guide stays.
    """
    flow, missed = guide.flow, probe.missed & (probe.share > LEAST)
    share = probe.share[missed]
    if guide.structure is not None or not len(share):
        return 0
    with torch.enable_grad():
        z = probe.locations[missed].detach().requires_grad_()
        loc = flow.chain.inverse_and_ladj(z)[0]
        rows = [torch.autograd.grad(loc[:, i].sum(), z, retain_graph=True)[0] for i in range(loc.shape[1])]
    loc, scale = loc.detach(), torch.stack(rows, -2) @ probe.scale[missed]
    scale, failed = torch.linalg.cholesky_ex(scale @ scale.mT)
    if failed.any() or not (loc.isfinite().all() and scale.isfinite().all()):
        return 0
    if isinstance(flow.base, ModesBase):
        old = flow.base.loc, flow.base.scale, flow.base.logits.detach().softmax(-1)
    else:
        old = torch.zeros_like(loc[:1]), torch.eye(loc.shape[1]).to(loc)[None], torch.ones_like(share[:1])
    share = torch.cat([old[2] * (1 - share.sum()), share])
    base = ModesBase(loc.shape[1], len(share)).to(loc)
    guide.flow = Flow(flow.chain, base.place(torch.cat([old[0], loc]), torch.cat([old[1], scale]), share))
    guide.flow.train(flow.training)
    return int(missed.sum())


def _fit(flow: Flow, draws: Tensor, generator: Generator | None, seconds: float | None) -> None:
    optimizer = AdamW([p for p in flow.parameters() if p.requires_grad], speeds_of(flow))
    budget = Budget(STEPS, seconds, time.monotonic())
    while (done := budget.fraction) < 1:
        rows = torch.randint(len(draws), (BATCH,), generator=generator, device="cpu").to(draws.device)
        loss = -flow.log_prob(draws[rows]).mean()
        norm = optimizer.take(torch.autograd.grad(loss, optimizer.parameters, allow_unused=True))
        optimizer.clip(norm, CLIP)
        optimizer.step(cosine(done, *RATES))
        budget.done += 1
    optimizer.release()
    flow.chain.clear_cache()
