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
CERTAIN = 4.5  # standard errors of a shift, of some hundreds of means, that is no chance


@dataclass(frozen=True)
class Walk:
    """What :func:`walk_draws` saw.

    Example:
        >>> posterior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> target = pf.infer.chains.BaseDensity(pf.Flow(pf.iaf(2)), posterior.log_prob)
        >>> u, log_weights = torch.randn(500, 2), torch.zeros(500)  # of an exact guide
        >>> walk = pf.infer.diagnostics.walk_draws(target, u, log_weights, num_walkers=64)
        >>> walk.shift, walk.above
        (0.0, 0.0)
    """

    log_weights: Tensor
    """Log-weights of the walkers at the end, float64 on the CPU, ``(S,)``."""
    above: float
    """The share of them above the largest log-weight of the guide's draws, by more than a tenth of a nat."""
    shift: float
    """The largest difference, in standard deviations, of the walkers' mean from that of the weighted draws, over base
    coordinates' percentiles and the distances of these from a half; 0 if none is above 4.5 standard errors."""
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
    weights cannot show that, but walkers reach it, and their weights there are larger than any that was drawn; or their
    means leave those of the weighted draws, which are compared with the walkers' means over their last moves, by
    regression on where each began.  Modes that are apart stay unseen: they take a search.

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

    Example:
        >>> posterior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> target = pf.infer.chains.BaseDensity(pf.Flow(pf.iaf(2)), posterior.log_prob)
        >>> u, log_weights = torch.randn(500, 2), torch.zeros(500)  # of an exact guide
        >>> walk = pf.infer.diagnostics.walk_draws(target, u, log_weights, num_walkers=64)
        >>> walk.above  # the share of walkers that found a larger weight
        0.0

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
    first, total = _percentiles(chains.points), torch.zeros((), dtype=torch.float64, device=u.device)
    size, accepted, moves, late = torch.tensor(SIZE, dtype=torch.float64), 0.0, 0, 0
    while moves < num_moves and not safe.expired:
        leaps = int(torch.randint(*LEAPS, (), generator=generator, device="cpu"))
        noise = torch.rand(num_walkers, generator=generator, dtype=torch.float64, device="cpu")
        move = hmc(target, chains, size * torch.exp(JITTER * (0.3 - noise)), leaps, generator=generator)
        if safe.expired:
            break  # points without a value would count as refused
        chains, moves, accepted = move.chains, moves + 1, accepted + float(move.chance.mean())
        size = adapt(size, move.chance.cpu()).clamp(max=1.5)
        if moves & (moves - 1) == 0:  # from a power of two on, as the last move is not known
            total, late = torch.zeros_like(total), 0
        total, late = total + _percentiles(chains.points), late + 1
    shift = _shift(first, total / late, _percentiles(u), log_weights) if late else 0.0
    after = target.log_weights(chains.points, chains.values).double().cpu()
    above = float((after > largest + MARGIN).double().mean())
    return Walk(after, above, shift, accepted / max(moves, 1), moves, safe.evaluations)


def _percentiles(u: Tensor) -> Tensor:
    """Returns percentiles of base coordinates and twice their distances from a half, ``(S, 2 D)``, between 0 and 1."""
    part = torch.special.ndtr(u.detach().double())
    return torch.cat([part, (2 * part - 1).abs()], -1)


def _shift(first: Tensor, late: Tensor, drawn: Tensor, log_weights: Tensor) -> float:
    """Returns the largest certain shift of a mean from the weighted draws' to the walkers', in standard deviations."""
    share = log_weights.detach().double().nan_to_num(-math.inf, -math.inf, -math.inf).softmax(0).unsqueeze(-1)
    mean = (share * drawn).sum(0)
    away = drawn - mean
    sd = (share * away.square()).sum(0).sqrt().clamp(min=1e-12)
    # Where walkers still are near their starts, these account for most of the noise.
    slope = ((first - first.mean(0)) * (late - late.mean(0))).mean(0) / first.var(0, correction=0).clamp(min=1e-12)
    left = late - slope * (first - mean) - mean
    error = (left.var(0) / len(left) + (share.square() * away.square()).sum(0)).sqrt()
    shift = left.mean(0).abs()
    return float((shift / sd).where(shift > CERTAIN * error, 0.0).max())
