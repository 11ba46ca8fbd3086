"""Hamiltonian Monte Carlo for many chains at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from pyro_flows.core.checks import integer

__all__ = ["Chains", "Move", "Pulled", "adapt", "hmc", "start_chains"]

Pulled = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps points ``(S, D)`` to log-densities ``(S,)`` in nats, not normalized, and gradients ``(S, D)``."""

DIVERGED = 1000.0  # nats of energy
SIZES = (1e-8, 1e3)  # of adapted steps


class Chains(NamedTuple):
    """The states of chains."""

    points: Tensor
    """``(S, D)``."""
    values: Tensor
    """Log-densities there, ``(S,)``."""
    slopes: Tensor
    """Gradients there, ``(S, D)``."""

    def where(self, taken: Tensor, other: Chains) -> Chains:
        """Returns the other's states for the chains that are ``taken``, shape ``(S,)``."""
        points, values, slopes = (
            torch.where(taken.reshape(-1, *[1] * (theirs.dim() - 1)), theirs, mine)
            for mine, theirs in zip(self, other, strict=True)
        )
        return Chains(points, values, slopes)


class Move(NamedTuple):
    """The result of a move of all chains."""

    chains: Chains
    """The states after the move."""
    chance: Tensor
    """The probability with which each proposal was to be taken, ``(S,)``; 0 if it failed."""
    taken: Tensor
    """Whether it was taken, ``(S,)``."""
    diverged: Tensor
    """Whether the density failed on the way, or the energy rose by more than 1000 nats, ``(S,)``."""


def start_chains(pulled: Pulled, points: Tensor) -> Chains:
    """Returns chains at these points ``(S, D)``; at a cost of one call."""
    return Chains(points, *_fine(pulled, points))


def hmc(
    pulled: Pulled,
    chains: Chains,
    sizes: Tensor | float,
    num_leaps: int,
    *,
    scale: Tensor | None = None,
    generator: Generator | None = None,
) -> Move:
    r"""Moves each chain by a Hamiltonian trajectory with fresh momenta, accepted by Metropolis' rule.

    A trajectory follows :math:`H(z, m) = -\log p(z) + \tfrac12 |m|^2` by leaps

    .. math::
        m \leftarrow m + \tfrac\epsilon2 L^\top \nabla\log p(z), \qquad
        z \leftarrow z + \epsilon L m, \qquad
        m \leftarrow m + \tfrac\epsilon2 L^\top \nabla\log p(z)

    and is taken with probability :math:`\min(1, e^{H - H'})`, which leaves :math:`p` invariant if sizes do not depend
    on the chains' present states.  A point without a finite density or gradient ends in a rejection, as does an energy
    that rises by more than 1000 nats.  The cost is ``num_leaps`` calls of ``S`` points.

    Args:
        pulled: the target, values with gradients.
        chains: the states, of :func:`start_chains` or of a move.
        sizes: the step sizes :math:`\epsilon`, one number or ``(S,)``.
        num_leaps: the leaps of each trajectory.
        scale: the scale :math:`L` of the moves: standard deviations ``(D,)``, or a matrix ``(D, D)``; none is the
            identity.
        generator: the source of randomness, on the CPU.

    References:
        Neal: MCMC using Hamiltonian dynamics, 2011, arXiv:1206.1901.
    """
    integer("hmc", "num_leaps", num_leaps)
    points, values, slopes = chains
    like = points.new_zeros(())
    step = torch.as_tensor(sizes, dtype=points.dtype, device=points.device).reshape(-1, 1)
    momentum = torch.randn(points.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)
    uniform = torch.rand(len(points), generator=generator, dtype=torch.float64, device="cpu")
    before = values.double() - 0.5 * momentum.double().square().sum(-1)
    failed = torch.zeros_like(values, dtype=torch.bool)
    for k in range(num_leaps):
        momentum = momentum + (0.5 if k == 0 else 1.0) * step * _pushed(slopes, scale)
        points = points + step * _carried(momentum, scale)
        # Chains that have failed stay where their density is known to be finite.
        points = torch.where(failed[:, None], chains.points, points)
        values, slopes = _fine(pulled, points)
        failed = failed | (values == -math.inf)
    momentum = momentum + 0.5 * step * _pushed(slopes, scale)
    change = values.double() - 0.5 * momentum.double().square().sum(-1) - before
    diverged = failed | ~(change > -DIVERGED)
    chance = torch.where(diverged, 0.0, change.clamp(max=0.0).exp())
    taken = uniform.to(chance.device) < chance
    return Move(chains.where(taken, Chains(points, values, slopes)), chance, taken, diverged)


def adapt(
    sizes: Tensor | float, chance: Tensor, *, target: float = 0.8, speed: float = 0.3, together: bool = True
) -> Tensor:
    r"""Multiplies step sizes by :math:`e^{s (a - a^*)}`, after a move with acceptance probabilities :math:`a`.

    Args:
        sizes: the step sizes, one number or ``(S,)``.
        chance: acceptance probabilities ``(S,)``.
        target: the probability :math:`a^*` to reach.
        speed: the speed :math:`s`; let it fall to 0, or stop adapting, before states count.
        together: whether all sizes follow the mean probability; if not, each follows its own chain's.

    References:
        Andrieu, Thoms: A tutorial on adaptive MCMC, 2008.
    """
    reached = chance.mean() if together else chance
    sizes = torch.as_tensor(sizes, dtype=chance.dtype, device=chance.device)
    return (sizes * torch.exp(speed * (reached - target))).clamp(*SIZES)


def _fine(pulled: Pulled, points: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values and gradients, ``-inf`` and 0 where either is not finite."""
    values, slopes = (part.detach() for part in pulled(points))
    fine = values.isfinite() & slopes.isfinite().all(-1)
    return values.masked_fill(~fine, -math.inf), slopes.masked_fill(~fine[:, None], 0.0).to(points)


def _carried(momentum: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return momentum
    return momentum @ scale.mT if scale.dim() == 2 else momentum * scale


def _pushed(slopes: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return slopes
    return slopes @ scale if scale.dim() == 2 else slopes * scale
