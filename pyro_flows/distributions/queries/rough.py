"""Log-densities of marginals by importance sampling, with their errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.distributions.queries.piece import Piece, kept, put

__all__ = ["FEWEST", "Estimate", "own_draws", "pool", "score_of"]

FEWEST = 100.0  # effective draws of a trusted estimate
AT_ONCE = 2**19  # numbers in a call


class Estimate(NamedTuple):
    """A number with what it is worth.

    Attributes:
        value: the estimate; of a density in nats.
        error: its standard error, 0 where it is exact.
        effective: the effective number of draws behind it, infinite where it is exact.
        trusted: whether all effective numbers are 100 and more.

    Example:
        >>> pair = pf.Flow(pf.maf(3, order="identity"))().marginal((0, 1))
        >>> value, error, effective = pair.estimate(torch.randn(5, 2))
        >>> error.tolist()  # exact
        [0.0, 0.0, 0.0, 0.0, 0.0]
    """

    value: Tensor
    error: Tensor
    effective: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Estimate:
        """A number without an error."""
        return cls(value, torch.zeros_like(value), torch.full_like(value, math.inf))

    @property
    def trusted(self) -> bool:
        """Whether all effective numbers are 100 and more."""
        return bool((self.effective >= FEWEST).all())


@contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Within it torch's random numbers begin at a seed; afterwards they go on as before."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


def pool(piece: Piece, z: Tensor, some: Tensor, closed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Events with ``some`` dimensions given and the others of a closed set drawn, and their log weights."""
    if (states := piece.states(closed & ~some)) is not None:
        wide = states.view(len(states), *(1 for _ in z.shape[:-1]), -1)
        drawn = put(z, closed & ~some, wide.expand(len(states), *z.shape[:-1], states.shape[-1]))
        return drawn, piece.score(drawn, closed)
    drawn, log_q = piece.propose(z, some, closed, num_samples)
    drawn = kept(some, z, drawn)  # with the graph of what is given
    # An event beyond the reach of the numbers weighs nothing.
    scores = piece.score(drawn, closed)
    return drawn, torch.where(scores.isnan(), -math.inf, scores) - log_q


def score_of(piece: Piece, z: Tensor, some: Tensor, num_samples: int) -> Estimate:
    r"""Computes the log-density of ``some`` dimensions in inner coordinates.

    With :math:`w_i = p(z_S, z_i) / q(z_i \mid z_S)` at draws of :math:`q`, the estimate is :math:`\log \frac1n \sum_i
    w_i`, the effective number :math:`n_e = (\sum_i w_i)^2 / \sum_i w_i^2`, and the standard error by the delta method
    :math:`\sqrt{(n / n_e - 1 + n (s - 1 / n)^2) / (n - 1)}`.  Its last part, with the largest share :math:`s` of a
    weight, counts that one twice: where few weights are large, others as large were missed by chance.
    """
    closed = piece.closed(some)
    if torch.equal(closed, some):
        return Estimate.exact(piece.score(z, some))
    if piece.states(closed & ~some) is not None:
        return Estimate.exact(pool(piece, z, some, closed, 0)[1].logsumexp(0))
    rows = max(1, z.shape[:-1].numel()) * piece.size
    sums, squares, tops, left = [], [], [], num_samples
    while left:
        count = min(left, max(1, AT_ONCE // rows))
        log_weights = pool(piece, z, some, closed, count)[1]
        sums.append(log_weights.logsumexp(0))
        squares.append((2 * log_weights.detach()).logsumexp(0))
        tops.append(log_weights.detach().amax(0))
        left -= count
    total = torch.stack(sums).logsumexp(0)
    effective = (2 * total.detach() - torch.stack(squares).logsumexp(0)).exp().nan_to_num(0.0).clamp(max=num_samples)
    excess = (torch.stack(tops).amax(0) - total.detach()).exp().nan_to_num(0.0) - 1 / num_samples
    spread = ((num_samples / effective - 1).clamp(min=0) + num_samples * excess.square()) / max(num_samples - 1, 1)
    return Estimate(total - math.log(num_samples), spread.sqrt(), effective)
