"""Entropy coding of whole numbers without bounds by an integer discrete flow.

The flow maps rows to its base without loss.  The base numbers of a group are independent, so all are coded together, by
decisions: is a number the one in the middle of its likeliest logistic; if not, does it lie above; then borders, by
doubling steps away from there until it lies between two of them, and by halves.  Most numbers take one or two.

Parameters come from networks in fixed point, equal everywhere; only the last digits of the logistic function differ
between machines.  Where a cumulative probability is close to the border between two roundings, the encoder notes its
choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from pyro_flows.core.checks import WHOLE_BOUND
from pyro_flows.distributions import Flow, IntegerLogistics
from pyro_flows.distributions.integers import Logistics
from pyro_flows.infer.compression.conditionals import digest_of, snapshot
from pyro_flows.infer.compression.decisions import WHOLE, Decisions, Piece, encoded, foreign, parity

__all__ = ["IntegerModel", "from_plain", "plain"]

COUNTS = 2**24  # cumulative probabilities are multiples of its inverse
SLACK = 2.0**-20  # of a count: how far two machines may differ
LEAST = 2**8  # the smallest share of a decision, out of WHOLE
_FAR = 2**56  # beyond all borders
_STEPS = 55  # of doubling, which reach beyond all numbers


class _Side(Protocol):
    """The encoder's or the decoder's side of the decisions."""

    def round(self, scaled: Tensor) -> Tensor:
        """Rounds cumulative probabilities in counts to integers."""

    def choose(self, part: Tensor, total: Tensor | int, test: Callable[[Tensor], Tensor], live: Tensor) -> Tensor:
        """Tells which of the ``live`` numbers pass a test; ``part`` of ``total`` counts belong to the others."""


class _Writer:
    """Decisions of known numbers; what only the file needs is computed of all together."""

    def __init__(self) -> None:
        self.value = torch.zeros(0, dtype=torch.long)  # of the group at hand
        self.scaled = [torch.zeros(0, dtype=torch.float64)]
        self.upper = [torch.zeros(0, dtype=torch.bool)]
        self.part, self.total = ([torch.zeros(0, dtype=torch.long)] for _ in range(2))

    def round(self, scaled: Tensor) -> Tensor:
        self.scaled.append(scaled)
        return (scaled + 0.5).floor_().long()

    def choose(self, part: Tensor, total: Tensor | int, test: Callable[[Tensor], Tensor], live: Tensor) -> Tensor:
        upper = test(self.value[live])
        self.upper.append(upper)
        self.part.append(part)
        self.total.append(torch.as_tensor(total).expand_as(part))
        return upper

    def piece(self) -> Piece:
        """All decisions, coded."""
        words = encoded(torch.cat(self.upper), _left(torch.cat(self.part), torch.cat(self.total)))
        shifted = torch.cat(self.scaled).add_(0.5)
        near = ((shifted - shifted.round()).abs_() < SLACK).nonzero()[:, 0]
        return Piece(words, near.numpy(), (shifted[near].floor().long() % 2 == 1).numpy())


class _Reader:
    """Decisions of a piece."""

    def __init__(self, piece: Piece) -> None:
        self.decisions = Decisions(piece.words)
        self.places, self.odd = piece.places, torch.from_numpy(piece.odd.astype(np.int64))
        self.count = 0

    def round(self, scaled: Tensor) -> Tensor:
        rounded = (scaled + 0.5).floor_().long()
        first, last = np.searchsorted(self.places, (self.count, self.count + len(scaled)))
        if first < last:
            at = torch.from_numpy(self.places[first:last] - self.count)
            rounded[at] = parity(scaled[at], self.odd[first:last])
        self.count += len(scaled)
        return rounded

    def choose(self, part: Tensor, total: Tensor | int, test: Callable[[Tensor], Tensor], live: Tensor) -> Tensor:
        return self.decisions.read(_left(part, torch.as_tensor(total)))


def _search(law: Logistics, rows: int, side: _Side) -> Tensor:
    """Finds whole numbers, shape ``(rows, n)``, by decisions."""
    center, parts = _prepared(law, rows)
    at = side.round(_below(parts, center))
    above = torch.maximum(side.round(_below(parts, center + 1)), at)
    every = torch.arange(len(center))
    same = side.choose(at + (COUNTS - above), COUNTS, center.__eq__, every)
    found, live = center, (~same).nonzero()[:, 0]
    center, at, above = torch.stack((center, at, above)).index_select(1, live)
    parts = parts.index_select(1, live)
    upper = side.choose(at, at + (COUNTS - above), center.__lt__, live)
    low, high = torch.where(upper, center + 1, -_FAR), torch.where(upper, _FAR, center)
    under, over = torch.where(upper, above, 0), torch.where(upper, COUNTS, at)
    steps = 0
    while len(live):
        steps += 1
        if steps == _STEPS and (high - low > _FAR // 2).any():
            raise foreign()
        middle = _middle(center, low, high)
        at = side.round(_below(parts, middle)).clamp(under, over)
        upper = side.choose(at - under, over - under, middle.__le__, live)
        low, high = torch.where(upper, middle, low), torch.where(upper, high, middle)
        under, over = torch.where(upper, at, under), torch.where(upper, over, at)
        found[live] = low  # right once nothing lies between
        keep = (high - low > 1).nonzero()[:, 0]
        if len(keep) < len(live):
            state = torch.stack((live, center, low, high, under, over)).index_select(1, keep)
            live, center, low, high, under, over = state
            parts = parts.index_select(1, keep)
    return found.view(rows, -1)


def _prepared(law: Logistics, rows: int) -> tuple[Tensor, Tensor]:
    """Starting points of all numbers, and their weights, locations and rates, shape ``(3 * K, numbers)``."""
    logits, loc, log_scale = torch.stack(law).movedim(-1, 1).expand(-1, -1, rows, -1).flatten(2)
    parts = torch.stack((torch.softmax(logits, 0), loc, torch.exp(-log_scale)))
    if not bool(parts.isfinite().all()):
        raise FloatingPointError("Codec: the model gives parameters that are not finite; look for NaN in its weights")
    top = loc.gather(0, logits.argmax(0, keepdim=True)).squeeze(0)
    return (top + 0.5).floor_().clamp_(-WHOLE_BOUND, WHOLE_BOUND - 1).long(), parts.flatten(0, 1)


def _below(parts: Tensor, border: Tensor) -> Tensor:
    """Cumulative probabilities of smaller numbers, in counts."""
    weight, loc, rate = parts.unflatten(0, (3, -1))
    inside = (border - 0.5 - loc).mul_(rate).sigmoid_().mul_(weight)
    return inside.sum(0).mul_(COUNTS)


def _left(part: Tensor, total: Tensor) -> Tensor:
    """The lower shares, out of ``WHOLE - 2``, of decisions of these counts; no outcome is impossible."""
    share = part * (WHOLE - 2 - 2 * LEAST) // total.clamp(min=1)
    return LEAST + torch.where(total > 0, share, WHOLE // 2 - LEAST)


def _middle(center: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The next borders: away from the center by doubling steps, then by halves."""
    inner = torch.where(low == -_FAR, 2 * high - center - 1, (low + high) >> 1)
    return torch.where(high == _FAR, 2 * low - center, inner)


class IntegerModel:
    """An integer flow in double precision on the CPU, as a model of rows.

    Attributes:
        model: the flow's copy.
        event_shape, context_dim: those of the flow.
        numbers: about how many numbers a pass holds per row.
    """

    levels = None  # all whole numbers

    def __init__(self, model: Flow) -> None:
        if not isinstance(model.base, IntegerLogistics):
            raise ValueError(
                "Codec: expected an integer flow over IntegerLogistics, its default base, got one over "
                f"{type(model.base).__name__}"
            )
        self.model = snapshot(model)
        self._base = cast(IntegerLogistics, self.model.base)
        self.event_shape, self.context_dim = model.event_shape, model.context_dim
        self.numbers = 64 * self.event_shape.numel()

    def digest(self) -> bytes:
        """An eight-byte digest of the model."""
        return digest_of(type(self).__name__, self.model, {})

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log-mass in nats, shape ``(rows,)``."""
        return self.model.log_prob(x.unflatten(1, self.event_shape), context)

    def _contexts(self, context: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The context of the chain, and of the base."""
        inner = self.model.inner_context(context)
        return inner, inner if self._base.context_dim else None

    def write(self, x: Tensor, context: Tensor | None) -> Piece:
        """Codes rows of 64-bit integers, shape ``(rows, D)``."""
        inner, of_base = self._contexts(context)
        base = self.model.chain.inverse_and_ladj(x.double().unflatten(1, self.event_shape), inner)[0].flatten(1)
        side = _Writer()
        for at, law in self._base.laws(base, of_base):
            side.value = base[:, at].long().flatten()
            _search(law, len(x), side)
        return side.piece()

    def read(self, piece: Piece, rows: int, context: Tensor | None) -> Tensor:
        """Reads rows of 64-bit integers, shape ``(rows, D)``."""
        inner, of_base = self._contexts(context)
        side, base = _Reader(piece), torch.zeros(rows, self.event_shape.numel(), dtype=torch.float64)
        for at, law in self._base.laws(base, of_base):
            base[:, at] = _search(law, rows, side).double()
        if (base.abs() > WHOLE_BOUND).any():
            raise foreign()
        return self.model.chain.forward_and_ladj(base.unflatten(1, self.event_shape), inner)[0].flatten(1).long()


def plain(x: Tensor) -> Piece:
    """Rows of 64-bit integers as they are."""
    words = x.contiguous().numpy().astype("<i8").view("<u4").reshape(-1)
    return Piece(words, np.zeros(0, np.int64), np.zeros(0, bool))


def from_plain(piece: Piece, rows: int, size: int) -> Tensor:
    """Reads rows that :func:`plain` wrote."""
    if len(piece.words) != 2 * rows * size:
        raise foreign()
    numbers = np.ascontiguousarray(piece.words.astype("<u4")).view("<i8").astype(np.int64)
    return torch.from_numpy(numbers).view(rows, size)
