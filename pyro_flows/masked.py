"""One pass through a masked network, forwards and backwards, without the work that the masks make useless.

A weight matrix sorted by degree is a staircase.  In large layers it is cut into a few bands of rows: what all rows of a
band see is used as it is stored, only the rest of the band is masked, and what none of them sees is not read at all.
Small layers take one masked product.  The whole network is one node of the autograd graph; second derivatives, and
everything that traces or transforms the call, take plain differentiable operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.activations import IN_PLACE, slope
from pyro_flows.tracing import plain_eager

__all__ = ["Band", "Layout", "keep", "masked_network", "staircase", "weight_gradient"]

Function = Callable[[Tensor], Tensor]


class Band(NamedTuple):
    """Rows ``[start, stop)`` of a weight: all see the columns below ``low``, none sees those from ``high`` on."""

    start: int
    stop: int
    low: int
    high: int


class Layout(NamedTuple):
    """What a pass needs to know of a network beside its weights."""

    activation: Function
    joins: frozenset[int]  # layers to which the pre-activation of two layers below is added
    bands: tuple[tuple[Band, ...], ...]  # of each layer


def staircase(above: Tensor, below: Tensor, dense: bool, repeats: int = 1) -> tuple[Band, ...]:
    """Bands of a layer whose rows have times ``above`` and see the columns with times ``below`` up to their own.

    ``dense`` says that masks hide nothing more; ``repeats`` that the rows come that many times.
    """
    rows, cols = len(above), len(below)
    pieces = 4 if rows >= 128 and rows * cols >= 2**16 else 1
    if pieces == 1:
        return (Band(0, rows * repeats, 0, cols),)
    cuts = [rows * j // pieces for j in range(pieces + 1)]
    bands = []
    for r in range(repeats):
        for a, c in zip(cuts, cuts[1:], strict=False):
            low = int((below <= above[a]).sum()) if dense else 0
            bands.append(Band(r * rows + a, r * rows + c, low, int((below <= above[c - 1]).sum())))
    return tuple(bands)


def keep(value: Tensor, bits: Tensor) -> Tensor:
    """Zeros where ``bits`` is zero: as cheap as a product, and whatever stands there, NaN included, is gone."""
    return (value.view(bits.dtype) & bits).view(value.dtype)


def masked_network(
    layout: Layout,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> Tensor:
    """The last layer's output.

    Args:
        layout: the static description.
        x: shape ``(*batch, inputs)``.
        first_bias: shape ``(width,)`` or broadcasting to ``(*batch, width)``.
        weights: one matrix per layer; what stands in masked places is never used.
        biases: those of the layers after the first.
        masks: one for each weight, an integer of its element's size with all bits set where the weight counts.
    """
    if not plain_eager() or masks[0].element_size() != weights[0].element_size():
        return _plain(layout, masks, x, first_bias, *weights, *biases)
    batch = x.shape[:-1]
    if first_bias.dim() > 1:
        first_bias = first_bias.expand(*batch, -1).reshape(-1, first_bias.shape[-1])
    out = _Pass.apply(layout, x.reshape(-1, x.shape[-1]), first_bias, *weights, *biases, *masks)
    return out.view(*batch, out.shape[-1])


def _plain(layout: Layout, masks: Sequence[Tensor], x: Tensor, first_bias: Tensor, *matrices: Tensor) -> Tensor:
    weights = [torch.where(mask != 0, weight, 0.0) for mask, weight in zip(masks, matrices, strict=False)]
    biases = matrices[len(weights) :]
    stream = pre = F.linear(x, weights[0]) + first_bias
    for k in range(1, len(weights)):
        pre = F.linear(layout.activation(pre), weights[k], biases[k - 1])
        if k in layout.joins:
            stream = pre = pre + stream
    return pre


def _forward(
    bands: Sequence[Band], weight: Tensor, bits: Tensor, bias: Tensor, x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """``x @ weight.T + bias``, and the masked parts of the weight, one a band."""
    if len(bands) == 1:
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


def weight_gradient(bands: Sequence[Band], bits: Tensor, grad: Tensor, x: Tensor, in_place: bool = True) -> Tensor:
    """The gradient after a weight, ``grad.T @ x`` with zeros in masked places."""
    if not in_place:
        return torch.where(bits != 0, grad.T @ x, 0.0)
    if len(bands) == 1:
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


def _by_input(bands: Sequence[Band], weight: Tensor, kept: Sequence[Tensor], grad: Tensor) -> Tensor:
    """The gradient after the layer's input."""
    if len(bands) == 1:
        return grad @ kept[0]
    total = grad.new_zeros(grad.shape[0], weight.shape[1])
    for (a, c, low, high), masked in zip(bands, kept, strict=True):
        part = grad[:, a:c]
        if low:
            total[:, :low].addmm_(part, weight[a:c, :low])
        if high > low:
            total[:, low:high].addmm_(part, masked)
    return total


def _split(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    layers = (len(tensors) + 1) // 3
    return tensors[:layers], tensors[layers : 2 * layers - 1], tensors[2 * layers - 1 :]


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, layout: Layout, x: Tensor, first_bias: Tensor, *tensors: Tensor) -> Tensor:
        weights, biases, masks = _split(tensors)
        pre, kept = _forward(layout.bands[0], weights[0], masks[0], first_bias, x)
        into, outof, parts = [], [], [kept]
        in_place = None if layout.joins else IN_PLACE.get(layout.activation)
        stream = pre
        for k in range(1, len(weights)):
            post = in_place(pre) if in_place else layout.activation(pre)
            into.append(pre)
            outof.append(post)
            pre, kept = _forward(layout.bands[k], weights[k], masks[k], biases[k - 1], post)
            parts.append(kept)
            if k in layout.joins:
                stream = pre = pre.add_(stream)
        ctx.layout, ctx.layers, ctx.counts = layout, len(weights), [len(kept) for kept in parts]
        flat = [masked for kept in parts for masked in kept]
        ctx.save_for_backward(x, first_bias, *tensors, *into, *outof, *flat)
        return pre

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, layers = ctx.layout, ctx.layers
        x, first_bias, *saved = ctx.saved_tensors
        weights, biases, masks = _split(saved[: 3 * layers - 1])
        nothing = [None] * layers
        if torch.is_grad_enabled():
            inputs = (x, first_bias, *weights, *biases)
            pull = torch.func.vjp(lambda *args: _plain(layout, masks, *args), *inputs)[1]
            return None, *pull(grad), *nothing
        rest = iter(saved[3 * layers - 1 :])
        into = [next(rest) for _ in range(layers - 1)]
        outof = [next(rest) for _ in range(layers - 1)]
        parts = [[next(rest) for _ in range(count)] for count in ctx.counts]
        by_weight: list[Tensor | None] = [None] * layers
        by_bias: list[Tensor | None] = [None] * layers
        after: dict[int, Tensor] = {}
        for k in range(layers - 1, 0, -1):
            wanted = ctx.needs_input_grad
            if wanted[3 + k]:
                by_weight[k] = weight_gradient(layout.bands[k], masks[k], grad, outof[k - 1])
            if wanted[2 + layers + k]:
                by_bias[k] = grad.sum(0)
            after[k] = grad
            grad = _by_input(layout.bands[k], weights[k], parts[k], grad)
            grad.mul_(slope(layout.activation, into[k - 1], outof[k - 1]))
            if k + 1 in layout.joins:  # this pre-activation also goes around the block above it
                grad.add_(after[k + 1])
        if ctx.needs_input_grad[3]:
            by_weight[0] = weight_gradient(layout.bands[0], masks[0], grad, x)
        by_first = grad if first_bias.dim() > 1 else grad.sum(0)
        by_x = _by_input(layout.bands[0], weights[0], parts[0], grad) if ctx.needs_input_grad[1] else None
        return None, by_x, by_first, *by_weight, *by_bias[1:], *nothing
