"""Products with weights that a mask makes a staircase, without the part of the work that the mask makes useless.

A weight matrix sorted by degree is a staircase.  In large layers it is cut into a few bands of rows: what all rows of a
band see is used as it is stored, only the rest of the band is masked, and what none of them sees is not read at all.
Small layers take one masked product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Band", "Cut", "band_product", "input_gradient", "keep", "staircase", "weight_gradient"]


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
