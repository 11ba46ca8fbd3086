"""A start for posteriors of several modes: a flow fitted to a mixture of Gaussians, one on each."""

from __future__ import annotations

import math
import time

import torch
from torch import Generator, Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.fitting.adam import Adam
from pyro_flows.infer.fitting.budget import cosine
from pyro_flows.infer.fitting.training import CLIP, speeds_of
from pyro_flows.infer.guides.probe import ModeProbe
from pyro_flows.transforms import Preconditioner

__all__ = ["cover_modes", "mixture_draws"]

DRAWS = 4096
BATCH = 256
STEPS = 600
LEAST = 0.003  # share of a mode that is worth a place in the start


def mixture_draws(probe: ModeProbe, n: int, generator: Generator | None = None) -> tuple[Tensor, int]:
    """Draws of a mixture of the modes' Gaussians by their shares, shape ``(n, D)``, and how many modes it has."""
    share = torch.where(probe.share > LEAST, probe.share, 0.0).double().cpu()
    which = torch.multinomial(share / share.sum(), n, replacement=True, generator=generator).to(probe.locations.device)
    dim = probe.locations.shape[1]
    noise = torch.randn(n, dim, generator=generator, dtype=torch.float64).to(probe.locations)
    draws = probe.locations[which] + (probe.scale[which] @ noise.unsqueeze(-1)).squeeze(-1)
    return draws, int((share > 0).sum())


def cover_modes(flow: Flow, probe: ModeProbe, generator: Generator | None = None, deadline: float = math.inf) -> int:
    """Fits the flow to the mixture by maximum likelihood, without a call of the model; returns the number of modes."""
    draws, modes = mixture_draws(probe, DRAWS, generator)
    preconditioner: Preconditioner = flow.chain[-1]
    centred = draws - draws.mean(0)
    covariance = centred.mT @ centred / len(draws)
    if preconditioner.full:
        scale = torch.linalg.cholesky(covariance + 1e-10 * torch.diag(covariance.diagonal()))
    else:
        scale = covariance.diagonal().sqrt()
    preconditioner.place(draws.mean(0), scale)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    optimizer = Adam(parameters, speeds_of(flow))
    begin = time.monotonic()
    for step in range(STEPS):
        done = step / STEPS
        if math.isfinite(deadline):
            done = max(done, (time.monotonic() - begin) / max(deadline - begin, 1e-3))
        if done >= 1:
            break
        rows = torch.randint(len(draws), (BATCH,), generator=generator).to(draws.device)
        loss = -flow.log_prob(draws[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip(CLIP)
        optimizer.step(cosine(done, 1e-2, 1e-4))
    flow.chain.clear_cache()
    return modes
