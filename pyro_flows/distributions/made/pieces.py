"""Marginals and conditionals of an autoregressive model, by its order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor

from pyro_flows.distributions.made.network import Member
from pyro_flows.distributions.queries.piece import Piece, kept, places_of
from pyro_flows.distributions.shared import by_row

__all__ = ["OrderPiece"]

STATES = 4096  # summed over


class OrderPiece(Piece):
    """One member of an autoregressive model, whose closed sets are the first dimensions of its order."""

    on_line = False

    def __init__(self, model: Any, context: Tensor | None, member: Member | None, batch_shape: Size) -> None:
        self.model, self.context, self.member = model, context, member
        self.size, self.batch_shape, self.discrete = model.input_dim, batch_shape, model.head.discrete
        self.order = model.order_of(member).cpu()
        with torch.no_grad():
            self.reference = model.draw(batch_shape, context, member).flatten(-len(model.event_shape))

    def closed(self, some: Tensor) -> Tensor:
        last = int(some[self.order].nonzero().max()) if some.any() else -1
        return torch.zeros_like(some).index_fill(0, self.order[: last + 1], True)

    def to_inner(self, y: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        return y, y.new_zeros(y.shape[:-1])

    def to_outer(self, z: Tensor) -> Tensor:
        return z

    def _params(self, z: Tensor) -> Tensor:
        value = z.reshape(z.shape[:-1] + self.model.event_shape)
        return self.model.params(value, self.context, self.member)

    def _each(self, z: Tensor, some: Tensor) -> Tensor:
        scores = self.model.head.log_prob(z, self._params(z))
        return scores.index_select(-1, places_of(some, z)).sum(-1)

    def score(self, z: Tensor, closed: Tensor) -> Tensor:
        return self._each(z, closed)

    def _drawn(self, z: Tensor, known: Tensor, last: int) -> Tensor:
        """Draws the dimensions up to a rank that are not known, each given those before it; one pass each."""
        z = z.clone()
        for index in self.order[:last].tolist():
            if not known[index]:
                dims = torch.tensor([index], device=z.device)
                z[..., index] = self.model.head.sample(self._params(z).index_select(-2, dims), dims).squeeze(-1)
        return z

    @torch.no_grad()
    def propose(self, z: Tensor, some: Tensor, closed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        drawn = self._drawn(z.expand(num_samples, *z.shape), some, int(closed.sum()))
        return drawn, self._each(drawn, closed & ~some)

    def complete(self, z: Tensor, closed: Tensor) -> Tensor:
        known = int(closed.sum())
        if known == self.size:
            return z
        if not hasattr(self.model, "member_for"):
            return kept(closed, z, self._drawn(z, closed, self.size))
        rows, context = z.reshape(-1, self.size), by_row(self.context, z.shape[:-1])
        drawn = self.model.net.draw(self.model.head, len(rows), context, self.member, rows, known)
        return kept(closed, z, drawn.reshape(z.shape))

    def states(self, some: Tensor) -> Tensor | None:
        every = self.model.head.num_values()
        counts = [every[k] for k in some.nonzero()[:, 0].tolist()]
        if not counts or None in counts or math.prod(counts) > STATES:
            return None
        axes = [torch.arange(count, dtype=self.reference.dtype, device=self.reference.device) for count in counts]
        return torch.cartesian_prod(*axes).reshape(-1, len(axes))
