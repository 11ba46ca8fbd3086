"""Fits a flow to a mixture of Gaussians on several modes."""

from __future__ import annotations

import time

import torch
from torch import Generator

from pyro_flows.distributions import Flow
from pyro_flows.infer.guides.loop import CLIP, speeds_of
from pyro_flows.infer.guides.posterior import preconditioner_of, spline_of
from pyro_flows.infer.machine.budget import Budget, cosine
from pyro_flows.infer.machine.optimizers import AdamW
from pyro_flows.infer.search.probe import ModeProbe

__all__ = ["cover_modes"]

DRAWS, BATCH, STEPS = 4096, 256, 600
RATES = (1e-2, 1e-4)
LEAST = 0.003  # least share of a mode in the start


def cover_modes(flow: Flow, probe: ModeProbe, generator: Generator | None = None, seconds: float | None = None) -> int:
    """Fits the flow to the mixture by maximum likelihood, without model calls; returns the number of modes."""
    share = torch.where(probe.share > LEAST, probe.share, 0.0).double().cpu()
    which = torch.multinomial(share / share.sum(), DRAWS, replacement=True, generator=generator)
    which = which.to(probe.locations.device)
    noise = torch.randn(DRAWS, probe.locations.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    draws = probe.locations[which] + (probe.scale[which] @ noise.to(probe.locations).unsqueeze(-1)).squeeze(-1)
    preconditioner = preconditioner_of(flow)
    spline = spline_of(flow)
    inner = draws if spline is None else spline.inverse_and_ladj(draws)[0]
    centered = inner - inner.mean(0)
    covariance = centered.mT @ centered / len(draws)
    if preconditioner.full:
        scale = torch.linalg.cholesky(covariance + 1e-10 * torch.diag(covariance.diagonal()))
    else:
        scale = covariance.diagonal().sqrt()
    preconditioner.place(inner.mean(0), scale)
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
    return int((share > 0).sum())
