r"""Levels as sequences of decisions, each with a probability in integers, and their entropy coding.

A level is told by bits, the highest first: is it in the lower or the upper part of what is left?  The cumulative
probability :math:`F(k)` of the border :math:`k` between both is rounded to an integer :math:`R(k)` out of ``COUNTS``;
from there on all is integer arithmetic, alike on all machines.  Each level has in addition a ``SHARE``-th of a count of
its own, so that nothing is impossible.

What encoder and decoder have to agree in is :math:`R(k)`.  Both compute :math:`F(k)` in double precision, but by other
routes, in other batches or on other machines, so that it may differ in the last digits.  Where ``COUNTS * F`` is within
``SLACK`` of the border between two integers, the encoder notes which one it took, so that they agree as long as both
values of :math:`F` are within ``SLACK / COUNTS`` of each other.  Zero and one are in the middle between such borders.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_flows.infer.compression.cumulative import Edges

__all__ = ["Piece", "Reader", "even", "tolerance", "write"]

COUNTS = 2**18
SHARE = 2**10
SLACK = 2.0**-18
WHOLE = 2**24  # what the range coder divides


def tolerance() -> float:
    """How far two computations of a cumulative probability may be apart: 2 ** -36."""
    return SLACK / COUNTS


class Piece(NamedTuple):
    """What rows become.

    Attributes:
        words: the range coder's output, integers of 32 bits.
        places: numbers of the decisions, from 0 on, whose rounding is noted; ascending.
        odd: for each of these, whether the integer was odd.
    """

    words: np.ndarray
    places: np.ndarray
    odd: np.ndarray


def _queue() -> tuple[Any, Any]:
    """The range coder, and a family of distributions of two outcomes."""
    try:
        stream = importlib.import_module("constriction").stream
    except ImportError as error:
        raise ImportError(
            "Codec: entropy coding is done by the package constriction, which is not installed: pip install "
            "'pyro-flows[compression]'"
        ) from error
    return stream.queue, stream.model.Categorical(perfect=False)


def _pairs(left: Tensor) -> np.ndarray:
    # The coder adds one to each of both and divides the rest in proportion: what adds up to the rest is left as it is.
    return torch.stack((left, WHOLE - 2 - left), -1).double().numpy()


def _scaled(probability: Tensor) -> Tensor:
    """In counts; raises where the model makes no number."""
    if not bool(probability.isfinite().all()):
        raise FloatingPointError(
            "Codec: the model gives probabilities that are NaN; look for numbers that are not finite, or far too "
            "large, in its parameters or in the context"
        )
    return probability * COUNTS


def even(levels: Tensor) -> Edges:
    """The cumulative probabilities of levels that are all as likely; ``levels``: shape ``(n,)``."""
    return lambda middle: middle.double() / levels


class _Bisection:
    """Where symbols of shape ``(rows, n)`` may be, as far as it is told; ``levels`` has shape ``(n,)``."""

    def __init__(self, levels: Tensor, rows: int) -> None:
        self.levels, self.bits = levels, (int(levels.max()) - 1).bit_length()
        self.low = levels.new_zeros(rows, len(levels))
        self.high = levels.expand(self.low.shape)
        self.below, self.above = torch.zeros_like(self.low), torch.full_like(self.low, COUNTS)

    def middle(self, bit: int) -> tuple[Tensor, Tensor]:
        """The borders, and where there is something to decide."""
        middle = self.low + (1 << bit)
        live = middle < self.levels
        return torch.minimum(middle, self.levels - 1).clamp(min=1), live

    def split(self, middle: Tensor, rounded: Tensor) -> Tensor:
        """The lower part's share of what is left, out of ``WHOLE - 2``."""
        self.at = torch.minimum(torch.maximum(rounded, self.below), self.above)
        lower = (self.at - self.below) * SHARE + (middle - self.low)
        total = (self.above - self.below) * SHARE + (self.high - self.low)
        return lower * (WHOLE - 2) // total

    def go(self, middle: Tensor, upper: Tensor, live: Tensor) -> None:
        up, down = live & upper, live & ~upper
        self.low, self.below = torch.where(up, middle, self.low), torch.where(up, self.at, self.below)
        self.high, self.above = torch.where(down, middle, self.high), torch.where(down, self.at, self.above)


def write(x: Tensor, levels: Tensor, steps: Sequence[Tensor], edges: Edges) -> Piece:
    """Codes rows whose conditionals are all known.

    Args:
        x: whole numbers, shape ``(rows, D)``.
        levels: shape ``(D,)``.
        steps: dimensions in the sequence in which they are told; those of one step come together.
        edges: cumulative probabilities of all dimensions.
    """
    queue, family = _queue()
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
    encoder = queue.RangeEncoder()
    encoder.encode(upper[order].int().numpy(), family, _pairs(left[order]))
    noted = near[order].nonzero()[:, 0]
    return Piece(encoder.get_compressed(), noted.numpy(), odd[order][noted].numpy())


class Reader:
    """Takes symbols from a piece, step by step, in the sequence in which they were told.

    Args:
        piece: of :func:`write`.
        levels: shape ``(D,)``.
        rows: how many.
    """

    def __init__(self, piece: Piece, levels: Tensor, rows: int) -> None:
        queue, self.family = _queue()
        self.coder = queue.RangeDecoder(piece.words.astype(np.uint32))
        self.places, self.odd = piece.places, piece.odd
        self.levels, self.rows, self.count = levels, rows, 0

    def read(self, dims: Tensor, edges: Edges) -> Tensor:
        """Whole numbers, shape ``(rows, n)``, of the dimensions of one step, whose cumulative probabilities are given.

        Raises:
            ValueError: where there is nothing that could have been written.
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
            try:
                found = torch.from_numpy(self.coder.decode(self.family, _pairs(left)))
            except AssertionError:
                raise ValueError(
                    "Codec: what the file holds is nothing that this model could have written; it was written "
                    "elsewhere, by other arithmetic, or tampered with"
                ) from None
            upper = torch.zeros(live.numel(), dtype=torch.bool)
            upper[chosen] = found.bool()
            told.go(middle, upper.view(live.T.shape).T, live)
        return told.low

    def _noted(self, rounded: Tensor, scaled: Tensor, chosen: Tensor) -> Tensor:
        """With the roundings that the encoder noted."""
        end = self.count + len(chosen)
        first, last = np.searchsorted(self.places, (self.count, end))
        if first < last:
            at = chosen[torch.from_numpy(self.places[first:last] - self.count)]
            odd = torch.from_numpy(self.odd[first:last].astype(np.int64))
            flat = rounded.T.flatten()
            near = scaled.T.flatten()[at]
            flat[at] = 2 * ((near - odd) / 2).round().long() + odd
            rounded = flat.view(rounded.T.shape).T
        self.count = end
        return rounded
