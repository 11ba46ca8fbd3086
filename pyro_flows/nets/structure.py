"""The memory layout of a triangular network: which blocks of its weights count, and its steps in order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.nets.activations import in_place

__all__ = ["Band", "Cut", "Structure", "band_product", "input_gradient", "keep", "staircase", "weight_gradient"]


class Band(NamedTuple):
    """Rows ``[start, stop)`` of a weight: all see the columns below ``low``, none sees those from ``high`` on."""

    start: int
    stop: int
    low: int
    high: int


class Cut(NamedTuple):
    """The bands of a layer, and from how many rows of input on leaving out masked work pays for their number."""

    bands: tuple[Band, ...]
    worth_from: float

    def at(self, n: int) -> tuple[Band, ...] | None:
        """The bands if they are worth it for ``n`` rows, else ``None``: one product for all."""
        return self.bands if n >= self.worth_from else None


def staircase(above: Tensor, below: Tensor, dense: bool, repeats: int = 1) -> Cut:
    """How to cut a layer whose rows have times ``above`` and see the columns with times ``below`` up to their own.

    ``dense`` says that masks hide nothing more; ``repeats`` that the rows come that many times.
    """
    rows, cols = len(above), len(below)
    if rows < 128 or cols < 64:
        return Cut((), math.inf)
    cuts = [rows * j // 4 for j in range(5)]
    bands = []
    for r in range(repeats):
        for a, c in itertools.pairwise(cuts):
            low = int((below <= above[a]).sum()) if dense else 0
            bands.append(Band(r * rows + a, r * rows + c, low, int((below <= above[c - 1]).sum())))
    # Measured: four bands, which cost some fifteen calls, pay from about this many multiplications on.
    return Cut(tuple(bands), 2**24 * len(bands) / 4 / (rows * repeats * cols) - 32)


def keep(value: Tensor, bits: Tensor) -> Tensor:
    """Zeros where ``bits`` is zero: as cheap as a product, and whatever stands there, NaN included, is gone."""
    return (value.view(bits.dtype) & bits).view(value.dtype)


def band_product(
    bands: Sequence[Band] | None, weight: Tensor, bits: Tensor, bias: Tensor, x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """``x @ weight.T + bias``, and the masked parts of the weight, one a band."""
    if bands is None:
        masked = keep(weight, bits)
        return torch.addmm(bias, x, masked.T), [masked]
    out = x.new_empty(x.shape[0], weight.shape[0])
    kept = []
    for a, c, low, high in bands:
        part = out[:, a:c]
        if low:
            torch.addmm(bias[..., a:c], x[:, :low], weight[a:c, :low].T, out=part)
        else:
            part.copy_(bias[..., a:c])
        masked = keep(weight[a:c, low:high], bits[a:c, low:high])
        if high > low:
            part.addmm_(x[:, low:high], masked.T)
        kept.append(masked)
    return out, kept


def weight_gradient(
    bands: Sequence[Band] | None, bits: Tensor, grad: Tensor, x: Tensor, in_place: bool = True
) -> Tensor:
    """The gradient after a weight, ``grad.T @ x`` with zeros in masked places."""
    if not in_place:
        return torch.where(bits != 0, grad.T @ x, 0.0)
    if bands is None:
        product = grad.T @ x
        product.view(bits.dtype).bitwise_and_(bits)
        return product
    product = grad.new_empty(bits.shape)
    for a, c, low, high in bands:
        if high:
            torch.mm(grad[:, a:c].T, x[:, :high], out=product[a:c, :high])
        product[a:c, low:high].view(bits.dtype).bitwise_and_(bits[a:c, low:high])
        product[a:c, high:].zero_()
    return product


def input_gradient(bands: Sequence[Band] | None, weight: Tensor, kept: Sequence[Tensor], grad: Tensor) -> Tensor:
    """The gradient after the layer's input."""
    if bands is None:
        return grad @ kept[0]
    total = grad.new_zeros(grad.shape[0], weight.shape[1])
    for (a, c, low, high), masked in zip(bands, kept, strict=True):
        part = grad[:, a:c]
        if low:
            total[:, :low].addmm_(part, weight[a:c, :low])
        if high > low:
            total[:, low:high].addmm_(part, masked)
    return total


class Structure:
    """Sizes and times of a triangular network: layer 0 is ``x``, then the hidden layers, then the outputs.

    Args:
        steps: for each input, by rank, the step at which it is solved; ascending.
        times: for each hidden layer, the number of steps that must be done before each unit; ascending.
        num_params: outputs per input.
        joins: indices (from 0) of the hidden layers to which the pre-activation of two layers below is added.
        dense: whether masks hold back nothing that the times let through; masked places are then never read.
        cuts: how the product with each weight is cut.
        features: rows of layer 0 that stand for each input, or ``None`` if that is the input itself.
        direct: whether the outputs also see layer 0; its weight then comes last.
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
        # before[l][t]: how many units of layer l have a time of at most t.
        self.before = [torch.searchsorted(time, moments, right=True).tolist() for time in (steps + 1, *times)]
        self.features, self.direct = features, direct
        # The same for rows that feed others: layer 0 may have several an input.
        self.feeding = [[n * (features or 1) for n in self.before[0]], *self.before[1:]]
        self.outputs = self.input_dim * num_params
        # Kept for the gradient: outputs, per-dimension ladj, hidden layers.  Its result: x, outputs, hidden layers.
        self.tape_rows = self.adjoint_rows = self.outputs + self.input_dim + sum(self.widths)
        long = (2, 32, 256, 2048)
        self.block = (2, 8, 16, 32, 64)[sum(self.num_steps > n for n in long)]

    def in_place(self, activation: Callable[[Tensor], Tensor]) -> bool:
        """Whether the tape holds the values of this activation (else what goes into it)."""
        return not self.joins and in_place(activation) is not None

    def rows(self, packed: Tensor, start: int) -> list[Tensor]:
        """The hidden layers' parts of a packed tensor, from row ``start`` on."""
        return list(packed[start:].split(self.widths)) if self.widths else []

    def unpack(
        self, tape: Tensor, activations: Sequence[Callable[[Tensor], Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """``(pre, post, params, ladj)``: into and out of activations, outputs ``(num_params, input_dim, n)``, ladj."""
        params = tape[: self.outputs].unflatten(0, (self.input_dim, self.num_params)).transpose(0, 1)
        head = self.outputs + self.input_dim
        hidden, ladj = self.rows(tape, head), tape[self.outputs : head]
        post = [pre if self.in_place(act) else act(pre) for act, pre in zip(activations, hidden, strict=True)]
        return hidden, post, params, ladj

    def unpack_adjoint(self, adjoint: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``(x, outputs, pre)``: the gradients, outputs parameter by parameter as in the weights."""
        head = self.input_dim + self.outputs
        outputs = adjoint[self.input_dim : head].unflatten(0, (self.input_dim, self.num_params))
        return adjoint[: self.input_dim], outputs.transpose(0, 1).flatten(0, 1), self.rows(adjoint, head)

    def blocks(self) -> list[tuple[int, int]]:
        """The steps in blocks ``[start, stop)``."""
        return [(t, min(t + self.block, self.num_steps)) for t in range(0, self.num_steps, self.block)]
