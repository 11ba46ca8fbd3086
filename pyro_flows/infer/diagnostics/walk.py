"""A walk of a guide's weighted draws, which shows where they never were."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pyro_flows.core.checks import integer
from pyro_flows.infer.chains import BaseDensity, adapt, hmc, start_chains
from pyro_flows.infer.diagnostics.weights import resample
from pyro_flows.infer.search.climb import SafeDensity

__all__ = ["Walk", "walk_draws"]

SIZE = 0.3  # the first step
JITTER = 1.0  # of the steps' logarithms, so that some are small where the posterior is thin
MARGIN = 0.1  # nats; smaller differences do no harm
LEAPS = (4, 9)  # least and, excluded, greatest


@dataclass(frozen=True)
class Walk:
    """What :func:`walk_draws` saw."""

    log_weights: Tensor
    """Log-weights of the walkers at the end, float64 on the CPU, ``(S,)``."""
    above: float
    """The share of them above the largest log-weight of the guide's draws, by more than a tenth of a nat."""
    accepted: float
    """The mean probability with which moves were taken."""
    num_moves: int
    """Moves that each walker made before time was up."""
    evaluations: int
    """Points at which the density was evaluated."""


def walk_draws(
    target: BaseDensity,
    u: Tensor,
    log_weights: Tensor,
    *,
    num_walkers: int = 512,
    num_moves: int = 30,
    generator: Generator | None = None,
    seconds: float | None = None,
) -> Walk:
    r"""Lets draws, resampled by their weights, walk by Hamiltonian Monte Carlo in the base of their flow.

    If the weighted draws follow the posterior, the walkers follow it before each move and after it, and the law of
    their weights stays.  If the guide never drew in a part of the posterior that hangs together with the rest, its
    weights cannot show that, but walkers reach it, and their weights there are larger than any that was drawn.  Modes
    that are apart stay unseen: they take a search.

    The cost is 180 evaluations with gradients of density and flow, at ``num_walkers`` points.

    Args:
        target: the posterior in the base, of a flow and an unnormalized log-density.
        u: draws of the base, ``(n, D)``.
        log_weights: the log-weights of their images, ``(n,)``.
        num_walkers: the number of walkers.
        num_moves: the moves of each.
        generator: the source of randomness, on the CPU.
        seconds: the wall-clock limit, checked between calls.

    Raises:
        ValueError: if shapes do not fit, or no weight is positive.

    References:
        The idea of moving particles after resampling is that of resample-move (Gilks, Berzuini, 2001); the base as the
        space to walk in is NeuTra's (Hoffman et al., 2019), arXiv:1903.03704.
    """
    integer("walk_draws", "num_walkers", num_walkers)
    integer("walk_draws", "num_moves", num_moves)
    density = target.density.density if isinstance(target.density, SafeDensity) else target.density
    safe = SafeDensity(density, u, seconds=seconds, rows=num_walkers)
    target = BaseDensity(target.flow, safe)
    values = log_weights.detach().double().cpu()
    largest = float(values[values < math.inf].max())
    chains = start_chains(target, resample(u, log_weights, num_walkers, generator))
    size, accepted, moves = torch.tensor(SIZE, dtype=torch.float64), 0.0, 0
    while moves < num_moves and not safe.expired:
        leaps = int(torch.randint(*LEAPS, (), generator=generator, device="cpu"))
        noise = torch.rand(num_walkers, generator=generator, dtype=torch.float64, device="cpu")
        move = hmc(target, chains, size * torch.exp(JITTER * (0.3 - noise)), leaps, generator=generator)
        if safe.expired:
            break  # points without a value would count as refused
        chains, moves, accepted = move.chains, moves + 1, accepted + float(move.chance.mean())
        size = adapt(size, move.chance.cpu()).clamp(max=1.5)
    after = target.log_weights(chains.points, chains.values).double().cpu()
    return Walk(
        after, float((after > largest + MARGIN).double().mean()), accepted / max(moves, 1), moves, safe.evaluations
    )
