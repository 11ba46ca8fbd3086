"""Walkers: many chains in the base of a flow, with moves of four kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.chains.base_density import BaseDensity
from pyro_flows.infer.chains.hmc import Chains, adapt, hmc, start_chains
from pyro_flows.infer.search.climb import SafeDensity

__all__ = ["Gaussians", "Tuning", "Walkers", "round_trip"]

LEAPS = 4, 12  # of a move in the base
SPREAD = 2.5  # logarithms that the step sizes of chains lie apart
LONGEST = 256  # leaps of a move among the latents
TRAVEL = 1.5  # standard deviations that such a move goes
LATENT_TARGET = 0.7  # its acceptance
HEIGHTS = 5  # corrections of the shares of a mixture
SHARE = 0.5  # the leaps among the latents by those in the base, where each costs a pass of the flow more


@dataclass(frozen=True)
class Gaussians:
    """A mixture of Gaussians on modes or along ridges, to jump between them."""

    locations: Tensor
    """``(K, D)``."""
    scale: Tensor
    """Cholesky factors of the covariances, ``(K, D, D)``."""
    share: Tensor
    """``(K,)``, with the sum 1."""

    @classmethod
    def of_heights(cls, locations: Tensor, scale: Tensor, log_p: Tensor) -> Gaussians:
        """Returns the mixture whose density at its centers is nearly in proportion to the posterior's."""
        mixture = cls(locations, scale, torch.full_like(log_p, 1 / len(log_p)))
        for _ in range(HEIGHTS):
            share = (mixture.share.log() + log_p - mixture.log_prob(locations)).softmax(0).clamp(min=1e-7)
            mixture = cls(locations, scale, share / share.sum())
        return mixture

    def sample(self, num_samples: int, generator: Generator | None = None) -> Tensor:
        """Draws ``(num_samples, D)``, with random numbers of the CPU."""
        which = torch.multinomial(self.share.double().cpu(), num_samples, replacement=True, generator=generator)
        return self.around(which.to(self.share.device), generator)

    def around(self, which: Tensor, generator: Generator | None = None) -> Tensor:
        """Draws from the Gaussians of these numbers, ``(n, D)``."""
        shape = len(which), self.locations.shape[1], 1
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(self.locations)
        return self.locations[which] + (self.scale[which] @ noise).squeeze(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log-densities ``(n,)``."""
        away = (z.unsqueeze(-2) - self.locations).movedim(0, -1)  # (K, D, n)
        unit = torch.linalg.solve_triangular(self.scale, away, upper=False)
        size = self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * z.shape[1] * math.log(2 * math.pi)
        each = -0.5 * unit.square().sum(-2) + (self.share.log() - size).unsqueeze(-1)
        return each.logsumexp(0)


@dataclass
class Tuning:
    """What moves learn on the way."""

    base_size: float = 0.4
    """Largest step size in the base."""
    latent_size: float = 0.1
    """Step size among the latents, in standard deviations of the walkers."""
    scale: Tensor | None = None
    """Cholesky factor of the walkers' covariance, ``(D, D)``, or their standard deviations, ``(D,)``."""


class Walkers:
    r"""Chains of a posterior, moved among the latents and in the base of a flow.

    A :meth:`sweep` leaves the posterior invariant. It consists of

    - Hamiltonian moves in the flow's base, where each chain has a step size of its own, since the flow may be right in
      one place and wrong in another;
    - a proposal of the flow, or of Gaussians on modes or along ridges, in turns, accepted by Metropolis' rule for
      independent proposals;
    - longer Hamiltonian moves among the latents, in the metric of the walkers' covariance, for a part of the time,
      because the base only hinders where the flow is wrong.

    Where the flow has no exact way back, moves by it are refused.

    Args:
        flow: a flow that is near the posterior.
        density: the posterior's log-density of latents, never raising.
        z: the latents to begin at, ``(S, D)``; those without a density give way to others.
        jumps: mixtures of Gaussians.
        leading: the number of walkers, the first ones, to which sizes adapt; by default all.

    Raises:
        ValueError: if the density is finite at none of the points.

    References:
        Gabrié, Rotskoff, Vanden-Eijnden: Adaptive Monte Carlo augmented with normalizing flows, 2021, arXiv:2105.12603.
        Grenioux et al.: On sampling with approximate transport maps, 2023, arXiv:2302.04763.
    """

    def __init__(
        self,
        flow: Flow,
        density: SafeDensity,
        z: Tensor,
        jumps: Sequence[Gaussians] = (),
        leading: int | None = None,
    ) -> None:
        self.flow, self.density, self.jumps = flow, density, list(jumps)
        self.target = BaseDensity(flow, density)
        self.tuning = Tuning()
        self.leading = len(z) if leading is None else leading
        self.diverged = 0
        self.renewed = 0.0  # the acceptance of the flow's last proposals
        self.jumped = 0.0  # and of the last mixture's
        self._leaps = [0, 0]  # in the base, among the latents
        self._turn = 0
        chains = start_chains(density.gradients, z)
        fine = (chains.values > -math.inf) & z.isfinite().all(-1)
        if not fine.any():
            raise ValueError("Walkers: the density is finite at none of the starting points")
        others = fine.nonzero().squeeze(-1)
        rows = torch.where(fine, torch.arange(len(z), device=z.device), others[torch.randint(len(others), (len(z),))])
        self.chains = Chains(*(part[rows] for part in chains))
        self.rescale()

    @property
    def latents(self) -> Tensor:
        """Where the walkers are, ``(S, D)``."""
        return self.chains.points

    @property
    def log_p(self) -> Tensor:
        """The posterior's log-densities there, ``(S,)``."""
        return self.chains.values

    @property
    def log_q(self) -> Tensor:
        """The flow's, ``(S,)``."""
        with torch.no_grad():
            found = self.flow.score(self.latents).to(self.log_p)
        return found.nan_to_num(nan=-math.inf)

    def rescale(self) -> None:
        """Takes the metric among the latents from the leading walkers."""
        z = self.latents[: self.leading].double()
        centered = z - z.mean(0)
        size = centered.square().mean(0).sqrt().clamp(min=1e-12)
        self.tuning.scale = size.to(self.latents)
        if len(z) > 2 * z.shape[1]:
            unit = centered / size
            gram = unit.mT @ unit / len(z)
            factor, failed = torch.linalg.cholesky_ex(gram + 1e-6 * torch.eye(len(gram)).to(gram))
            if not failed:
                self.tuning.scale = (size.unsqueeze(-1) * factor).to(self.latents)

    def sweep(self, adapting: bool) -> None:
        """Moves all walkers by each kind of move; ``adapting`` sizes makes the draws on the way unusable."""
        self._in_base(adapting)
        turn, self._turn = self._turn % (1 + len(self.jumps)), self._turn + 1
        if turn:
            self.jumped = self._jump(self.jumps[turn - 1])
        else:
            self.renewed = self._renew()
        if self._leaps[1] <= SHARE * self._leaps[0]:
            if adapting:
                self.rescale()
            self._among_latents(adapting)

    def _in_base(self, adapting: bool) -> None:
        leaps = int(torch.randint(LEAPS[0], LEAPS[1] + 1, ()))
        sizes = self.tuning.base_size * torch.exp(-SPREAD * torch.rand(len(self.latents)))
        u, known = round_trip(self.flow, self.latents)
        move = hmc(self.target, start_chains(self.target, torch.where(known.unsqueeze(-1), u, 0.0)), sizes, leaps)
        self._leaps[0] += leaps
        self.diverged += int((move.diverged & known).sum())
        arrived, back = self._from_base(move.chains.points)
        self.chains = self.chains.where(known & move.taken & back, arrived)
        chance = move.chance[: self.leading][known[: self.leading]]
        if adapting and len(chance):
            self.tuning.base_size = min(2.0, float(adapt(self.tuning.base_size, chance.double())))

    def _from_base(self, u: Tensor) -> tuple[Chains, Tensor]:
        """Returns chains at base-side points, and whether they lead back there and have a density."""
        with torch.no_grad():
            z = self.flow.chain.forward_and_ladj(u)[0]
        fine = z.isfinite().all(-1) & round_trip(self.flow, z)[1]
        chains = start_chains(self.density.gradients, torch.where(fine.unsqueeze(-1), z, self.latents))
        return chains, fine & (chains.values > -math.inf)

    def _renew(self) -> float:
        base = self.flow.base()
        u = base.sample((len(self.latents),))
        arrived, back = self._from_base(u)
        with torch.no_grad():
            proposed = base.log_prob(u) - self.flow.chain.forward_and_ladj(u)[1]
        known = round_trip(self.flow, self.latents)[1]
        log_chance = arrived.values - proposed - self.log_p + self.log_q
        return self._take(arrived, torch.where(known & back, log_chance, -math.inf))

    def _jump(self, mixture: Gaussians) -> float:
        arrived = start_chains(self.density.gradients, mixture.sample(len(self.latents)))
        log_chance = arrived.values - mixture.log_prob(arrived.points) - self.log_p + mixture.log_prob(self.latents)
        return self._take(arrived, log_chance)

    def _take(self, proposed: Chains, log_chance: Tensor) -> float:
        """Metropolis' rule for independent proposals; returns the accepted part."""
        taken = torch.rand(len(log_chance)).to(log_chance).log() < log_chance  # NaN is refused
        self.chains = self.chains.where(taken, proposed)
        return float(taken.double().mean())

    def _among_latents(self, adapting: bool) -> None:
        # One size for all: a thin end needs long walks, which the others must share.
        size = self.tuning.latent_size * math.exp(SPREAD * (0.3 - float(torch.rand(()))))
        leaps = int(min(LONGEST, max(8.0, TRAVEL / size)) * (0.5 + 0.5 * float(torch.rand(()))))
        move = hmc(self.density.gradients, self.chains, size, leaps, scale=self.tuning.scale)
        self._leaps[1] += leaps
        self.diverged += int(move.diverged.sum())
        self.chains = move.chains
        if adapting:
            chance = move.chance[: self.leading]
            self.tuning.latent_size = min(1.0, float(adapt(self.tuning.latent_size, chance, target=LATENT_TARGET)))


@torch.no_grad()
def round_trip(flow: Flow, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the base-side points of latents ``(S, D)``, and whether they lead back there."""
    u = flow.chain.inverse_and_ladj(z)[0]
    back = flow.chain.forward_and_ladj(u)[0]
    near = (back - z).abs() <= torch.finfo(z.dtype).eps ** 0.5 * (z.abs() + z.std(0, correction=0))
    return u, near.all(-1) & u.isfinite().all(-1)
