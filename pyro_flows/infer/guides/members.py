"""Resamples the members of plates one by one, each by its own weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyro_flows.distributions import Flow
from pyro_flows.infer.guides.posterior import slope_of
from pyro_flows.infer.machine.pace import rows_at_once
from pyro_flows.infer.models.recorded import value_and_slope
from pyro_flows.infer.models.structure import Structure
from pyro_flows.infer.search.climb import LogDensity

__all__ = ["pick_members"]

CANDIDATES = 4
NODES = (4, 8, 16, 32)  # of quadrature, more where needed
EXACT = 0.02  # largest error of a difference of log-weights, in nats
ROWS = 256


def pick_members(
    flow: Flow, density: LogDensity, structure: Structure, num_samples: int, candidates: int = CANDIDATES
) -> tuple[Tensor, Tensor] | None:
    r"""Draws globals and several candidates of each member, of which the member's own weights pick one.

    Joint weights multiply over members, so they are uneven where there are many. Given globals :math:`g`, members are
    independent under the model and the guide, so that :math:`w(z) = w(g) \prod_j w_j(l_j)`. The ratio of a member's
    weights at two candidates is the integral of its part of :math:`\nabla \log w` along the line between them, taken
    for all members at once, by Gauss and Legendre's rule. Its sum over members is known, too, which shows its error.
    The weights of the picked draws, :math:`w(g) \prod_j \frac1M \sum_m w_j(l_j^m)`, have the mean of the first ones.

    Members of members (pupils of a class) are picked together with their ancestor, and chains as wholes. The cost is
    ``4 (candidates - 1)`` gradients of model and guide per draw, more for densities that are not smooth.

    Returns:
        Draws ``(n, D)`` and log-weights ``(n,)``; ``None`` if the integrals are not accurate, or for one chain alone.

    References:
        Pseudo-marginal importance sampling (Beaumont, 2003; Andrieu & Roberts, 2009), arXiv:0903.5480.
    """
    owner = _owners(structure, flow.event_shape[0])
    local = owner >= 0
    count = int(owner.max()) + 1
    if count == 1:
        return None
    nodes = NODES[0]
    draws, log_weights = [], []
    for part in torch.arange(num_samples).split(rows_at_once(density, ROWS)):
        x = flow.base().sample((candidates, len(part)))
        x[1:, :, ~local] = x[0, :, ~local]
        with torch.no_grad():
            z = flow.chain.forward_and_ladj(x)[0]
            values = torch.stack([density(each) - flow.score(each) for each in z])
        while True:
            ratios = torch.stack([_ratios(flow, density, z[0], other, owner[local], local, nodes) for other in z[1:]])
            known = values[1:] - values[0]
            fine = known.isfinite() & ratios.isfinite().all(-1)
            error = (ratios.sum(-1) - known)[fine].abs()
            if not len(error) or error.quantile(0.99) < EXACT:
                break
            if nodes == NODES[-1]:
                return None
            nodes *= 2
        ratios = torch.where(fine[..., None], ratios, -math.inf)
        ratios = torch.cat([ratios.new_zeros(1, len(part), count), ratios])
        log_weights.append(values[0] + (ratios.logsumexp(0) - math.log(candidates)).sum(-1))
        picked = (ratios - torch.rand_like(ratios).clamp(min=1e-300).log().neg().log()).argmax(0)
        chosen = torch.zeros_like(z[0], dtype=torch.long)
        chosen[:, local] = picked[:, owner[local]]
        draws.append(z.gather(0, chosen[None])[0])
    return torch.cat(draws), torch.cat(log_weights)


def _owners(structure: Structure, dim: int) -> Tensor:
    """Returns for each latent the number of its outermost member or its chain, -1 for globals, ``(dim,)``."""
    owner = torch.full((dim,), -1)
    numbers: list[Tensor] = []
    count = 0
    for group in structure.groups:
        if group.above:
            parent, of = group.above[0]
            numbers.append(numbers[parent][of])
        else:
            numbers.append(count + torch.arange(len(group.places)) // group.length)
            count += len(group.places) // group.length
        owner[group.places] = numbers[-1][:, None]
    return owner


def _ratios(
    flow: Flow, density: LogDensity, first: Tensor, second: Tensor, owner: Tensor, local: Tensor, nodes: int
) -> Tensor:
    """Returns each member's difference of log-weights between two draws ``(n, D)``, shape ``(n, members)``."""
    step = (second - first)[:, local]
    found = torch.zeros(len(first), int(owner.max()) + 1, dtype=first.dtype, device=first.device)
    for place, weight in zip(*map(np.ndarray.tolist, np.polynomial.legendre.leggauss(nodes)), strict=True):
        z = torch.lerp(first, second, 0.5 * (place + 1))
        pull = torch.cat([value_and_slope(density, each)[1] for each in z.split(rows_at_once(density, len(z)))])
        found.index_add_(1, owner.to(found.device), 0.5 * weight * step * (pull - slope_of(flow, z))[:, local])
    return found
