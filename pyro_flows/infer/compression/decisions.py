"""Entropy coding of levels as decisions with integer probabilities.

A level is coded bit by bit, the highest first: does it lie in the lower or the upper part of the remaining levels?  The
cumulative probability :math:`F(k)` of the border :math:`k` is rounded to an integer :math:`R(k)` out of ``COUNTS``; the
rest is integer arithmetic, equal on all machines.  Each level has another ``SHARE``-th of a count, so that none is
impossible.

Encoder and decoder must agree on :math:`R(k)`, but the last digits of :math:`F(k)` may differ.  Where ``COUNTS * F`` is
within ``SLACK`` of the border between two integers, the encoder notes its choice.  So both agree if their :math:`F` are
within ``SLACK / COUNTS`` of each other.  Zero and one lie midway between borders.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_flows.infer.compression.conditionals import Edges

__all__ = ["Decisions", "Piece", "Reader", "encoded", "even", "foreign", "parity", "write"]

COUNTS = 2**18
SHARE = 2**10
SLACK = 2.0**-18
WHOLE = 2**24  # the total that the range coder divides


class Piece(NamedTuple):
    """A coded piece of the rows.

    ``words`` are the range coder's 32-bit output, ``places`` the ascending indices of the decisions with noted
    rounding, and ``odd`` says which of these integers were odd.
    """

    words: np.ndarray
    places: np.ndarray
    odd: np.ndarray


def _queue() -> tuple[Any, Any]:
    """The range coder, and a family of two-outcome distributions."""
    try:
        stream = importlib.import_module("constriction").stream
    except ImportError as error:
        raise ImportError(
            "Codec: entropy coding needs the package constriction, which is not installed: pip install "
            "'pyro-flows[compression]'"
        ) from error
    return stream.queue, stream.model.Categorical(perfect=False)


def _pairs(left: Tensor) -> np.ndarray:
    # The coder adds one to both and divides the rest in proportion, which keeps numbers that add up to the rest.
    return torch.stack((left, WHOLE - 2 - left), -1).double().numpy()


def encoded(upper: Tensor, left: Tensor) -> np.ndarray:
    """The range coder's words for decisions, ``upper`` or lower, with lower shares ``left`` out of ``WHOLE - 2``."""
    queue, family = _queue()
    encoder = queue.RangeEncoder()
    encoder.encode(upper.int().numpy(), family, _pairs(left))
    return encoder.get_compressed()


class Decisions:
    """Reads decisions from the range coder's words."""

    def __init__(self, words: np.ndarray) -> None:
        queue, self.family = _queue()
        self.coder = queue.RangeDecoder(words.astype(np.uint32))

    def read(self, left: Tensor) -> Tensor:
        """Which of the next decisions are upper.

        Raises:
            ValueError: if the words cannot have been written with these shares.
        """
        try:
            return torch.from_numpy(self.coder.decode(self.family, _pairs(left))).bool()
        except AssertionError:
            raise foreign() from None


def foreign() -> ValueError:
    """The error for words that the model cannot have written."""
    return ValueError(
        "Codec: this model cannot have written the file; it was written elsewhere, by other arithmetic, or tampered "
        "with"
    )


def parity(scaled: Tensor, odd: Tensor) -> Tensor:
    """The integer of this parity next to each count."""
    return 2 * ((scaled - odd) / 2).round().long() + odd


def _scaled(probability: Tensor) -> Tensor:
    """The probability in counts; refuses NaN."""
    if not bool(probability.isfinite().all()):
        raise FloatingPointError(
            "Codec: the model gives probabilities that are NaN; look for numbers that are not finite, or far too "
            "large, in its parameters or in the context"
        )
    return probability * COUNTS


def even(levels: Tensor) -> Edges:
    """Cumulative probabilities of equally likely levels; ``levels`` has shape ``(n,)``."""
    return lambda middle: middle.double() / levels


class _Bisection:
    """The ranges left for symbols of shape ``(rows, n)``; ``levels`` has shape ``(n,)``."""

    def __init__(self, levels: Tensor, rows: int) -> None:
        self.levels, self.bits = levels, (int(levels.max()) - 1).bit_length()
        self.low = levels.new_zeros(rows, len(levels))
        self.high = levels.expand(self.low.shape)
        self.below, self.above = torch.zeros_like(self.low), torch.full_like(self.low, COUNTS)

    def middle(self, bit: int) -> tuple[Tensor, Tensor]:
        """The borders, and where a decision remains."""
        middle = self.low + (1 << bit)
        live = middle < self.levels
        return torch.minimum(middle, self.levels - 1).clamp(min=1), live

    def split(self, middle: Tensor, rounded: Tensor) -> Tensor:
        """The lower part's share, out of ``WHOLE - 2``."""
        self.at = torch.minimum(torch.maximum(rounded, self.below), self.above)
        lower = (self.at - self.below) * SHARE + (middle - self.low)
        total = (self.above - self.below) * SHARE + (self.high - self.low)
        return lower * (WHOLE - 2) // total

    def go(self, middle: Tensor, upper: Tensor, live: Tensor) -> None:
        up, down = live & upper, live & ~upper
        self.low, self.below = torch.where(up, middle, self.low), torch.where(up, self.at, self.below)
        self.high, self.above = torch.where(down, middle, self.high), torch.where(down, self.at, self.above)


def write(x: Tensor, levels: Tensor, steps: Sequence[Tensor], edges: Edges) -> Piece:
    """Codes rows, given all their conditionals.

    ``x`` has shape ``(rows, D)``, ``levels`` ``(D,)``; the dimensions of one step are coded together.
    """
    told = _Bisection(levels, len(x))
    kept: list[tuple[Tensor, ...]] = []
    for bit in reversed(range(told.bits)):
        middle, live = told.middle(bit)
        scaled = _scaled(edges(middle)) + 0.5
        rounded = scaled.floor()
        near = (scaled - scaled.round()).abs() < SLACK
        rounded = rounded.long()
        left = told.split(middle, rounded)
        upper = x >= middle
        told.go(middle, upper, live)
        kept.append((live, upper, left, near, rounded % 2 == 1))
    if not kept:  # one level everywhere
        return Piece(np.zeros(0, np.uint32), np.zeros(0, np.int64), np.zeros(0, bool))
    live, upper, left, near, odd = (torch.stack(each).flatten() for each in zip(*kept, strict=True))
    places = torch.arange(len(live)).view(told.bits, *x.shape).transpose(1, 2)
    order = torch.cat([places[:, dims].flatten() for dims in steps])
    order = order[live[order]]
    noted = near[order].nonzero()[:, 0]
    return Piece(encoded(upper[order], left[order]), noted.numpy(), odd[order][noted].numpy())


class Reader:
    """Reads symbols from a piece, step by step, in coding order."""

    def __init__(self, piece: Piece, levels: Tensor, rows: int) -> None:
        self.decisions = Decisions(piece.words)
        self.places, self.odd = piece.places, piece.odd
        self.levels, self.rows, self.count = levels, rows, 0

    def read(self, dims: Tensor, edges: Edges) -> Tensor:
        """Reads the dimensions of one step: whole numbers, shape ``(rows, n)``.

        Raises:
            ValueError: if the model cannot have written the piece.
        """
        told = _Bisection(self.levels[dims], self.rows)
        for bit in reversed(range(told.bits)):
            middle, live = told.middle(bit)
            chosen = live.T.flatten().nonzero()[:, 0]
            if not len(chosen):
                continue
            scaled = _scaled(edges(middle))
            rounded = self._noted((scaled + 0.5).floor().long(), scaled, chosen)
            left = told.split(middle, rounded).T.flatten()[chosen]
            upper = torch.zeros(live.numel(), dtype=torch.bool)
            upper[chosen] = self.decisions.read(left)
            told.go(middle, upper.view(live.T.shape).T, live)
        return told.low

    def _noted(self, rounded: Tensor, scaled: Tensor, chosen: Tensor) -> Tensor:
        """Corrects the rounded numbers by the encoder's notes."""
        end = self.count + len(chosen)
        first, last = np.searchsorted(self.places, (self.count, end))
        if first < last:
            at = chosen[torch.from_numpy(self.places[first:last] - self.count)]
            odd = torch.from_numpy(self.odd[first:last].astype(np.int64))
            flat = rounded.T.flatten()
            flat[at] = parity(scaled.T.flatten()[at], odd)
            rounded = flat.view(rounded.T.shape).T
        self.count = end
        return rounded
