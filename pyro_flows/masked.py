"""One pass through a masked network, forwards and backwards, without the work that the masks make useless.

A weight matrix sorted by degree is a staircase.  In large layers it is cut into a few bands of rows: what all rows of a
band see is used as it is stored, only the rest of the band is masked, and what none of them sees is not read at all.
Small layers take one masked product.  The whole network is one node of the autograd graph; second derivatives, and
everything that traces or transforms the call, take plain differentiable operations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.activations import IN_PLACE, pull
from pyro_flows.tracing import autocasting, plain_eager

__all__ = ["Band", "Cut", "Head", "Layout", "keep", "masked_network", "staircase", "weight_gradient"]

Function = Callable[[Tensor], Tensor]

ROWS = 2048  # of a batch at a time, where no gradient is wanted


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


class Layout(NamedTuple):
    """What a pass needs to know of a network beside its weights."""

    activation: Function
    joins: frozenset[int]  # layers to which the pre-activation of two layers below is added
    cuts: tuple[Cut, ...]  # of each layer


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


class Head(NamedTuple):
    """What to do with a network's outputs: move each input by the univariate, or by its inverse."""

    univariate: object
    inverse: bool

    def move(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """``(moved, ladj)``, elementwise; outputs come parameter by parameter."""
        params = out.unflatten(-1, (self.univariate.num_params, x.shape[-1])).transpose(-1, -2)
        return self.univariate.inverse(x, params) if self.inverse else self.univariate.forward(x, params)

    def run(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As :meth:`move`, by hand, with what the gradient needs; ``out`` may be overwritten."""
        return self.univariate.run(self.inverse, x, out.view(*x.shape[:-1], self.univariate.num_params, x.shape[-1]))

    def pull(
        self, x: Tensor, moved: Tensor, ladj: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients after ``x`` and the outputs."""
        grads = (grad, grad_ladj.unsqueeze(-1))
        by_x, by_params = self.univariate.pull(self.inverse, x, moved, ladj, kept, *grads)
        return by_x, by_params.flatten(-2)


def masked_network(
    layout: Layout,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    head: Head | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The last layer's output; with a head, ``x`` moved by it and the ladj of that, summed over dimensions.

    Args:
        layout: the static description.
        x: shape ``(*batch, inputs)``.
        first_bias: shape ``(width,)`` or broadcasting to ``(*batch, width)``.
        weights: one matrix per layer; what stands in masked places is never used.
        biases: those of the layers after the first.
        masks: one for each weight, an integer of its element's size with all bits set where the weight counts.
        head: what to do with the outputs, if not to return them.
    """
    if autocasting(x.device):  # the ladj is worth full precision
        with torch.autocast(x.device.type, enabled=False):
            return masked_network(layout, x, first_bias.to(x.dtype), weights, biases, masks, head)
    if not plain_eager() or masks[0].element_size() != weights[0].element_size():
        return _plain(layout, head, masks, x, first_bias, *weights, *biases)
    batch = x.shape[:-1]
    if first_bias.dim() > 1:
        first_bias = first_bias.expand(*batch, -1).reshape(-1, first_bias.shape[-1])
    flat = x if len(batch) == 1 else x.reshape(batch.numel(), x.shape[-1])
    if torch.is_grad_enabled():
        out = _apply(layout, head, masks, flat, first_bias, *weights, *biases)
    elif flat.shape[0] > 2 * ROWS and flat.device.type == "cpu":
        # In pieces that stay in the processor's cache, since nothing of them is kept.
        own = first_bias.dim() > 1
        pieces = zip(flat.split(ROWS), first_bias.split(ROWS) if own else itertools.repeat(first_bias), strict=False)
        done = [_result(layout, rows, bias, weights, biases, masks, head) for rows, bias in pieces]
        out = torch.cat(done) if head is None else tuple(torch.cat(part) for part in zip(*done, strict=True))
    else:
        out = _result(layout, flat, first_bias, weights, biases, masks, head)
    if len(batch) == 1:
        return out
    if head is None:
        return out.view(*batch, out.shape[-1])
    return out[0].view(x.shape), out[1].view(batch)


def _result(
    layout: Layout,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    head: Head | None,
) -> Tensor | tuple[Tensor, Tensor]:
    out = _run(layout, x, first_bias, weights, biases, masks)[0]
    if head is None:
        return out
    moved, ladj, _ = head.run(x, out)
    return moved, ladj.sum(-1)


def _plain(
    layout: Layout, head: Head | None, masks: Sequence[Tensor], x: Tensor, first_bias: Tensor, *matrices: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    weights = [torch.where(mask != 0, weight, 0.0) for mask, weight in zip(masks, matrices, strict=False)]
    biases = matrices[len(weights) :]
    stream = pre = F.linear(x, weights[0]) + first_bias
    for k in range(1, len(weights)):
        pre = F.linear(layout.activation(pre), weights[k], biases[k - 1])
        if k in layout.joins:
            stream = pre = pre + stream
    if head is None:
        return pre
    moved, ladj = head.move(x, pre)
    return moved, ladj.sum(-1)


def _forward(
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


def _by_input(bands: Sequence[Band] | None, weight: Tensor, kept: Sequence[Tensor], grad: Tensor) -> Tensor:
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


def _run(
    layout: Layout,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[list[Tensor]], list[Sequence[Band] | None]]:
    """The output, what goes into and out of each activation, the masked parts of each weight, and how it was cut."""
    in_place = None if layout.joins else IN_PLACE.get(layout.activation)
    n = x.shape[0]
    bands = [cut.at(n) for cut in layout.cuts]
    pre, kept = _forward(bands[0], weights[0], masks[0], first_bias, x)
    into, outof, parts = [], [], [kept]
    stream = pre
    for k in range(1, len(weights)):
        post = in_place(pre) if in_place else layout.activation(pre)
        into.append(pre)
        outof.append(post)
        pre, kept = _forward(bands[k], weights[k], masks[k], biases[k - 1], post)
        parts.append(kept)
        if k in layout.joins:
            stream = pre = pre.add_(stream)
    return pre, into, outof, parts, bands


class _Pass(torch.autograd.Function):
    """The network, and with a head the univariate map of ``x`` by the network's outputs and the sum of its ladj."""

    @staticmethod
    def forward(
        ctx: object,
        layout: Layout,
        head: Head | None,
        masks: Sequence[Tensor],
        x: Tensor,
        first_bias: Tensor,
        *tensors: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        layers = len(masks)
        out, into, outof, parts, ctx.bands = _run(layout, x, first_bias, tensors[:layers], tensors[layers:], masks)
        ctx.layout, ctx.head, ctx.masks = layout, head, masks
        ctx.counts = [len(kept) for kept in parts]
        flat = [masked for kept in parts for masked in kept]
        if head is None:
            ctx.save_for_backward(x, first_bias, *tensors, *into, *outof, *flat)
            return out
        moved, ladj, kept = head.run(x, out)
        ctx.save_for_backward(x, first_bias, *tensors, *into, *outof, *flat, moved, ladj, *kept)
        return moved, ladj.sum(-1)

    @staticmethod
    def backward(ctx: object, grad: Tensor, grad_ladj: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if autocasting(grad.device):
            with torch.autocast(grad.device.type, enabled=False):
                return _Pass.backward(ctx, grad, grad_ladj)
        layout, head, masks, bands = ctx.layout, ctx.head, ctx.masks, ctx.bands
        layers = len(masks)
        x, first_bias, *saved = ctx.saved_tensors
        weights, biases = saved[:layers], saved[layers : 2 * layers - 1]
        if torch.is_grad_enabled():
            inputs = (x, first_bias, *weights, *biases)
            backwards = torch.func.vjp(lambda *args: _plain(layout, head, masks, *args), *inputs)[1]
            return None, None, None, *backwards(grad if head is None else (grad, grad_ladj))
        rest = iter(saved[2 * layers - 1 :])
        into = [next(rest) for _ in range(layers - 1)]
        outof = [next(rest) for _ in range(layers - 1)]
        parts = [[next(rest) for _ in range(count)] for count in ctx.counts]
        _, _, _, wants_x, _, *wanted = ctx.needs_input_grad
        by_x: Tensor | None = None
        if head is not None:
            by_x, grad = head.pull(x, next(rest), next(rest), tuple(rest), grad, grad_ladj)
        by_weight: list[Tensor | None] = [None] * layers
        by_bias: list[Tensor | None] = [None] * layers
        after: dict[int, Tensor] = {}
        for k in range(layers - 1, 0, -1):
            if wanted[k]:
                by_weight[k] = weight_gradient(bands[k], masks[k], grad, outof[k - 1])
            if wanted[layers + k - 1]:
                by_bias[k] = grad.sum(0)
            after[k] = grad
            grad = _by_input(bands[k], weights[k], parts[k], grad)
            grad = pull(layout.activation, grad, into[k - 1], outof[k - 1])
            if k + 1 in layout.joins:  # this pre-activation also goes around the block above it
                grad.add_(after[k + 1])
        if wanted[0]:
            by_weight[0] = weight_gradient(bands[0], masks[0], grad, x)
        by_first = grad if first_bias.dim() > 1 else grad.sum(0)
        if wants_x:
            through = _by_input(bands[0], weights[0], parts[0], grad)
            by_x = through if by_x is None else by_x.add_(through)
        return None, None, None, by_x if wants_x else None, by_first, *by_weight, *by_bias[1:]


# Without the detour by which apply() looks for transforms of torch.func: there are none where it is called.
_apply = super(torch.autograd.Function, _Pass).apply
