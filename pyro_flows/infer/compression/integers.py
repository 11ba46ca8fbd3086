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


class _Side(Protocol):
    """The encoder's or the decoder's side of the decisions."""

    def round(self, scaled: Tensor) -> Tensor:
        """Rounds cumulative probabilities in counts to integers."""

    def choose(self, left: Tensor, test: Callable[[Tensor], Tensor], live: Tensor) -> Tensor:
        """Tells which of the ``live`` numbers pass a test; ``left`` is the share of the others."""


class _Writer:
    """Decisions of known numbers."""

    def __init__(self) -> None:
        self.count = 0
        self.value = torch.zeros(0, dtype=torch.long)  # of the group at hand
        self.upper, self.left = ([torch.zeros(0, dtype=kind)] for kind in (torch.bool, torch.long))
        self.places, self.odd = ([torch.zeros(0, dtype=kind)] for kind in (torch.long, torch.bool))

    def round(self, scaled: Tensor) -> Tensor:
        shifted = scaled + 0.5
        rounded = shifted.floor().long()
        near = ((shifted - shifted.round()).abs() < SLACK).nonzero()[:, 0]
        self.places.append(near + self.count)
        self.odd.append(rounded[near] % 2 == 1)
        self.count += len(scaled)
        return rounded

    def choose(self, left: Tensor, test: Callable[[Tensor], Tensor], live: Tensor) -> Tensor:
        upper = test(self.value[live])
        self.upper.append(upper)
        self.left.append(left)
        return upper

    def piece(self) -> Piece:
        """All decisions, coded."""
        words = encoded(torch.cat(self.upper), torch.cat(self.left))
        return Piece(words, torch.cat(self.places).numpy(), torch.cat(self.odd).numpy())


class _Reader:
    """Decisions of a piece."""

    def __init__(self, piece: Piece) -> None:
        self.decisions = Decisions(piece.words)
        self.places, self.odd = piece.places, torch.from_numpy(piece.odd.astype(np.int64))
        self.count = 0

    def round(self, scaled: Tensor) -> Tensor:
        rounded = (scaled + 0.5).floor().long()
        first, last = np.searchsorted(self.places, (self.count, self.count + len(scaled)))
        if first < last:
            at = torch.from_numpy(self.places[first:last] - self.count)
            rounded[at] = parity(scaled[at], self.odd[first:last])
        self.count += len(scaled)
        return rounded

    def choose(self, left: Tensor, test: Callable[[Tensor], Tensor], live: Tensor) -> Tensor:
        return self.decisions.read(left)


def _search(law: Logistics, rows: int, side: _Side) -> Tensor:
    """Finds whole numbers, shape ``(rows, n)``, by decisions."""
    center, parts = _prepared(law, rows)
    live = torch.arange(len(center))
    at = side.round(_below(parts, center))
    above = torch.maximum(side.round(_below(parts, center + 1)), at)
    found = center.clone()
    beside = at + (COUNTS - above)
    same = side.choose(_left(beside, torch.full_like(at, COUNTS)), center.__eq__, live)
    keep = (~same).nonzero()[:, 0]
    live, center, at, above, parts = live[keep], center[keep], at[keep], above[keep], parts[..., keep]
    upper = side.choose(_left(at, at + (COUNTS - above)), center.__lt__, live)
    low, high = torch.where(upper, center + 1, -_FAR), torch.where(upper, _FAR, center)
    under, over = torch.where(upper, above, 0), torch.where(upper, COUNTS, at)
    while len(live):
        middle = _middle(center, low, high)
        if (middle.abs() >= _FAR // 4).any():
            raise foreign()
        at = side.round(_below(parts, middle))
        at = torch.minimum(torch.maximum(at, under), over)
        upper = side.choose(_left(at - under, over - under), middle.__le__, live)
        low, high = torch.where(upper, middle, low), torch.where(upper, high, middle)
        under, over = torch.where(upper, at, under), torch.where(upper, over, at)
        done = high - low == 1
        found[live[done]] = low[done]
        keep = (~done).nonzero()[:, 0]
        live, center, low, high, under, over = (each[keep] for each in (live, center, low, high, under, over))
        parts = parts[..., keep]
    return found.view(rows, -1)


def _prepared(law: Logistics, rows: int) -> tuple[Tensor, Tensor]:
    """Starting points of all numbers, and their weights, locations and rates, shape ``(3, K, numbers)``."""
    parts = torch.stack((torch.softmax(law.logits, -1), law.loc, torch.exp(-law.log_scale)))
    if not bool(parts.isfinite().all()):
        raise FloatingPointError("Codec: the model gives parameters that are not finite; look for NaN in its weights")
    top = law.loc.gather(-1, law.logits.argmax(-1, keepdim=True)).squeeze(-1)
    center = (top + 0.5).floor().clamp(-WHOLE_BOUND, WHOLE_BOUND - 1).long()
    parts = parts.movedim(-1, 1).expand(-1, -1, rows, -1)
    return center.expand(rows, -1).reshape(-1), parts.reshape(*parts.shape[:2], -1)


def _below(parts: Tensor, border: Tensor) -> Tensor:
    """Cumulative probabilities of smaller numbers, in counts."""
    weight, loc, rate = parts
    inside = (border - 0.5 - loc).mul_(rate).sigmoid_().mul_(weight)
    return inside.sum(0).mul_(COUNTS)


def _left(part: Tensor, total: Tensor) -> Tensor:
    """The lower shares, out of ``WHOLE - 2``, of decisions of these counts; no outcome is impossible."""
    share = part * (WHOLE - 2 - 2 * LEAST) // total.clamp(min=1)
    return LEAST + torch.where(total > 0, share, WHOLE // 2 - LEAST)


def _middle(center: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The next borders: away from the center by doubling steps, then by halves."""
    away = torch.where(high == _FAR, center + 2 * (low - center), center - 2 * (center - high) - 1)
    return torch.where((high == _FAR) | (low == -_FAR), away, (low + high) // 2)


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
