"""Draws of a MADE by the engine of the inverse: one sweep through the dimensions, each weight used once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flows.bands import keep
from pyro_flows.distributions.made.contract import Head
from pyro_flows.distributions.made.members import Member
from pyro_flows.solver import Solver
from pyro_flows.sweeps import ForwardSweep, columns_at_once

__all__ = ["Sampler"]


class _Draws:
    """What the sweep does with a dimension's parameters: draws it, or takes what is known of it.

    Args:
        head: says how to draw.
        order: dimensions by rank.
        known: how many of the first ranks are given.
    """

    def __init__(self, head: Head, order: Tensor, known: int) -> None:
        self.head, self.order, self.known = head, order, known
        # Whether the network sees the value itself, so that its inputs need no room of their own.
        self.shared = head.num_features == 1 and type(head).code is Head.code

    def draws(
        self, start: int, stop: int, z: Tensor, params: Tensor, x: Tensor, coded: Tensor
    ) -> list[Callable[[], object]]:
        """Calls that fill ``x`` and its features at ranks ``[start, stop)``; everything feature-major."""
        calls: list[Callable[[], object]] = []
        given = min(max(self.known - start, 0), stop - start)
        dims = self.order[start:stop].to(z.device)
        if given:
            calls.append(lambda: x[:given].copy_(z[:given]))
            if not self.shared:
                calls.append(lambda: self._code(x[:given], dims[:given], coded))
        if given < stop - start:
            features = self.head.num_features
            rest = coded[given * features :]
            calls += self.head.draws(dims[given:], z[given:], params[given:], x[given:], rest)
        return calls

    def _code(self, x: Tensor, dims: Tensor, coded: Tensor) -> None:
        made = self.head.features(x.T, dims)  # (columns, n, features)
        coded[: made.shape[-2] * made.shape[-1]].copy_(made.flatten(-2).T)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.head}, known={self.known})"


class Sampler:
    """A member's weights in the order in which the sweep uses them, and the sweep itself.

    Args:
        head: says how to draw.
        activations: after each hidden layer.
        member: whose order and masks to use.
        known: how many of the first dimensions in the order will be given.
        weights, biases: of the network, the direct weight last; only for their sizes.
    """

    def __init__(
        self,
        head: Head,
        activations: Sequence[Callable[[Tensor], Tensor]],
        member: Member,
        known: int,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
    ) -> None:
        self.head, self.member, self.known = head, member, known
        self.solver = Solver(member.structure(), activations, _Draws(head, member.order, known))
        device = weights[0].device
        self.order, self.rank = member.order.to(device), member.rank.to(device)
        self._places = [(rows.to(device), columns.to(device)) for rows, columns in member.permutations()]
        self._weights = [torch.empty_like(weight) for weight in weights]
        self._biases = [torch.empty_like(bias) for bias in biases[1:]]

    def fits(self, head: Head, member: Member, known: int, like: Tensor) -> bool:
        """Whether this one is for that head, member and kind of tensor."""
        kind = (self._weights[0].dtype, self._weights[0].device)
        same = self.head is head and self.member is member and self.known == known
        return same and kind == (like.dtype, like.device)

    def load(self, weights: Sequence[Tensor], biases: Sequence[Tensor], bits: Sequence[Tensor]) -> None:
        """Takes the weights as they are now, sorted, with zeros in masked places."""
        for room, weight, mask, (rows, columns) in zip(self._weights, weights, bits, self._places, strict=True):
            room.copy_(keep(weight, mask).index_select(0, rows).index_select(1, columns))
        for room, bias, (rows, _) in zip(self._biases, biases[1:], self._places[1:], strict=False):
            torch.index_select(bias, 0, rows, out=room)

    def run(self, rows: int, first_bias: Tensor, given: Tensor | None) -> Tensor:
        """Draws of shape ``(rows, D)``; ``first_bias``: ``(width,)``, ``(1, width)`` or ``(rows, width)``."""
        first = first_bias.reshape(-1, first_bias.shape[-1]).index_select(1, self._places[0][0])
        own = first.shape[0] > 1
        dims = len(self.order)
        out = first.new_empty(rows, dims)
        chunk = columns_at_once(rows, self.solver.structure.adjoint_rows, out.device)
        for start in range(0, rows, chunk):
            part = slice(start, min(rows, start + chunk))
            size = part.stop - part.start
            noise = torch.rand(size, dims, dtype=out.dtype, device=out.device)
            if self.known:
                noise[:, : self.known] = given[part].index_select(1, self.order[: self.known]).to(out.dtype)
            sweep = self.solver.borrow(ForwardSweep, noise, size, self._weights, self._biases, own)
            sweep.run(noise, first[part] if own else first, self._weights, [])
            out[part] = sweep.x.T
            self.solver.give_back(sweep)
        return out.index_select(1, self.rank)
