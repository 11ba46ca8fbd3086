"""The memory layout of a triangular network, and products that skip its zero blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.nets.activations import in_place

__all__ = ["Band", "Cut", "Structure", "keep", "staircase"]


class Band(NamedTuple):
    """Rows ``[start, stop)`` of a weight, all blind to columns from ``high`` on."""

    start: int
    stop: int
    high: int


class Cut(NamedTuple):
    """The bands of a layer, whose rows come ``repeats`` times, and the number of input rows from which they pay."""

    bands: tuple[Band, ...] = ()
    repeats: int = 1
    worth_from: float = math.inf

    def _rows(self, value: Tensor, band: Band, dim: int = 0) -> Tensor:
        """A band's rows, as ``(repeats, rows)``."""
        return torch.unflatten(value, dim, (self.repeats, -1)).narrow(dim + 1, band.start, band.stop - band.start)

    def product(self, weight: Tensor, bits: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns ``x @ weight.T + bias`` and the masked weight, by bands where they pay."""
        if x.shape[0] < self.worth_from:
            masked = (weight.view(bits.dtype) & bits).view(weight.dtype)
            out = F.linear(x, masked, bias) if bias.dim() == 1 else torch.addmm(bias, x, masked.t())
            return out, [masked]
        out = x.new_empty(len(x), len(weight))
        kept = []
        for band in self.bands:
            seen, mask = (self._rows(each, band)[..., : band.high] for each in (weight, bits))
            kept.append(keep(seen, mask).flatten(0, 1))
            own = self._rows(bias, band, bias.dim() - 1).flatten(-2)
            place = self._rows(out, band, 1)
            if self.repeats == 1:
                torch.addmm(own, x[:, : band.high], kept[-1].T, out=place[:, 0])
            else:
                place.copy_(torch.addmm(own, x[:, : band.high], kept[-1].T).view(place.shape))
        return out, kept

    def weight_gradient(self, bits: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient with respect to a weight: ``grad.T @ x`` with zeros in masked places."""
        if x.shape[0] < self.worth_from:
            product = torch.mm(grad.t(), x)
            product.view(bits.dtype).bitwise_and_(bits)
            return product
        product = grad.new_zeros(bits.shape)
        for band in self.bands:
            place, mask = (self._rows(each, band)[..., : band.high] for each in (product, bits))
            own = self._rows(grad, band, 1).flatten(1)
            if self.repeats == 1:
                torch.mm(own.T, x[:, : band.high], out=place[0])
            else:
                place.copy_((own.T @ x[:, : band.high]).view(place.shape))
            place.view(mask.dtype).bitwise_and_(mask)
        return product

    def input_gradient(self, kept: Sequence[Tensor], grad: Tensor, columns: int) -> Tensor:
        """The gradient with respect to a layer's input of so many columns."""
        if grad.shape[0] < self.worth_from:
            return torch.mm(grad, kept[0])
        total = grad.new_zeros(len(grad), columns)
        for band, masked in zip(self.bands, kept, strict=True):
            total[:, : band.high].addmm_(self._rows(grad, band, 1).flatten(1), masked)
        return total


def staircase(above: Tensor, below: Tensor, repeats: int = 1) -> Cut:
    """Cuts a layer whose rows, of times ``above``, see the columns with times ``below`` up to their own.

    Rows come ``repeats`` times.
    """
    rows, cols = len(above), len(below)
    if rows * repeats < 128 or rows < 4 or cols < 64:
        return Cut()
    cuts = [rows * j // 4 for j in range(5)]
    bands = [Band(a, c, int((below <= above[c - 1]).sum())) for a, c in itertools.pairwise(cuts)]
    # Four bands, some fifteen calls, pay from about this many multiplications on.
    return Cut(tuple(bands), repeats, 2**24 / (rows * repeats * cols) - 32)


def keep(value: Tensor, bits: Tensor) -> Tensor:
    """Zeros where ``bits`` is zero, even in place of NaN; as cheap as a product."""
    return (value.view(bits.dtype) & bits).view(value.dtype)


class Structure:
    """Sizes and times of a triangular network: layer 0 is ``x``, then come hidden layers and outputs.

    Args:
        steps: the step that solves each input, by rank; ascending.
        times: for each hidden layer, how many steps must precede each unit; ascending.
        num_params: outputs per input.
        joins: hidden layers, from 0, to which the pre-activation two layers below is added.
        dense: whether the times alone imply the masks; masked places are then never read.
        cuts: the cut of each weight.
        features: rows of layer 0 per input, or ``None`` for the input itself.
        direct: whether the outputs also see layer 0; that weight comes last.
    """

    def __init__(
        self,
        steps: Tensor,
        times: Sequence[Tensor],
        num_params: int,
        joins: Sequence[int],
        dense: bool,
        cuts: tuple[Cut, ...],
        features: int | None = None,
        direct: bool = False,
    ) -> None:
        self.input_dim, self.num_params = len(steps), num_params
        self.num_steps = int(steps[-1]) + 1
        self.widths = [len(time) for time in times]
        self.joins, self.dense, self.cuts = frozenset(joins), dense, cuts
        moments = torch.arange(self.num_steps + 1)
        # before[l][t] units of layer l have a time of at most t.
        self.before = [torch.searchsorted(time, moments, right=True).tolist() for time in (steps + 1, *times)]
        self.features, self.direct = features, direct
        self.outputs = self.input_dim * num_params
        # The tape holds outputs, per-dimension ladj, hidden layers; the adjoint x, outputs, hidden layers.
        self.tape_rows = self.adjoint_rows = self.outputs + self.input_dim + sum(self.widths)
        long = (2, 32, 256, 2048)
        self.block = (2, 8, 16, 32, 64)[sum(self.num_steps > n for n in long)]

    def in_place(self, activation: Callable[[Tensor], Tensor]) -> bool:
        """Whether the tape holds this activation's values rather than its arguments."""
        return not self.joins and in_place(activation) is not None

    def rows(self, packed: Tensor, start: int) -> list[Tensor]:
        """Splits a packed tensor from row ``start`` on into hidden layers."""
        return list(packed[start:].split(self.widths)) if self.widths else []

    def unpack(
        self, tape: Tensor, activations: Sequence[Callable[[Tensor], Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Returns ``(pre, post, params, ladj)``; ``params`` has shape ``(num_params, input_dim, n)``."""
        params = torch.unflatten(tape[: self.outputs], 0, (self.input_dim, self.num_params)).transpose(0, 1)
        head = self.outputs + self.input_dim
        hidden, ladj = self.rows(tape, head), tape[self.outputs : head]
        post = [pre if self.in_place(act) else act(pre) for act, pre in zip(activations, hidden, strict=True)]
        return hidden, post, params, ladj

    def unpack_adjoint(self, adjoint: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns gradients ``(x, outputs, pre)``, outputs parameter by parameter."""
        head = self.input_dim + self.outputs
        outputs = torch.unflatten(adjoint[self.input_dim : head], 0, (self.input_dim, self.num_params))
        return adjoint[: self.input_dim], outputs.transpose(0, 1).flatten(0, 1), self.rows(adjoint, head)

    def blocks(self) -> list[tuple[int, int]]:
        """Blocks of steps ``[start, stop)``."""
        return [(t, min(t + self.block, self.num_steps)) for t in range(0, self.num_steps, self.block)]
