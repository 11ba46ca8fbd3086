"""One pass through a masked network, forwards and backwards, without the work that the masks make useless.

The network and the univariate map that it serves are one node of the autograd graph; second derivatives, and everything
that traces or transforms the call, take plain differentiable operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flows.core.modes import GradientByHand, full_precision, plain_eager
from pyro_flows.nets.activations import in_place, pull
from pyro_flows.nets.structure import Band, Cut, band_product, input_gradient, keep, weight_gradient

__all__ = ["Head", "Layout", "Slab", "Slabs", "masked_network"]


class Slab(NamedTuple):
    """Dimensions ``[start, stop)`` by rank, none of which sees the hidden units from ``high`` on."""

    start: int
    stop: int
    high: int


class Slabs:
    """The ways to cut the outputs, one for each number of slabs.

    Args:
        steps: the step of each dimension, by rank.
        times: the times of the last hidden layer's units.
        num_params: parameters per dimension.
    """

    def __init__(self, steps: Tensor, times: Tensor, num_params: int) -> None:
        dims = len(steps)
        self.work = 2 * num_params * dims * len(times)  # of one sample, if nothing is left out
        self.ways = []
        for count in (1, 2, 4, 8):
            if count > dims:
                break
            cuts = [dims * k // count for k in range(count + 1)]
            highs = [int((times <= steps[c - 1]).sum()) for c in cuts[1:]]
            self.ways.append(tuple(map(Slab, cuts, cuts[1:], highs)))

    def at(self, n: int, device: torch.device) -> tuple[Slab, ...]:
        """The best way for ``n`` samples: a slab costs as much time as some 2^23 operations on a processor's core."""
        if device.type != "cpu":
            return self.ways[0]
        return min(self.ways, key=lambda way: self.work * n * (len(way) + 1) / (2 * len(way)) + 2**23 * len(way))


class Head(NamedTuple):
    """What to do with a network's outputs: move each input by the univariate."""

    univariate: object

    def move(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """``(moved, ladj)``, elementwise; outputs come parameter by parameter."""
        params = out.unflatten(-1, (self.univariate.num_params, x.shape[-1])).transpose(-1, -2)
        return self.univariate.forward(x, params)

    def run(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As :meth:`move`, by hand, with what the gradient needs; ``out`` may be overwritten."""
        return self.univariate.run(False, x, out.view(*x.shape[:-1], self.univariate.num_params, x.shape[-1]))

    def pull(
        self, x: Tensor, moved: Tensor, ladj: Tensor, kept: Sequence[Tensor], grad: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients after ``x`` and the outputs."""
        grads = (grad, grad_ladj.unsqueeze(-1))
        by_x, by_params = self.univariate.pull(False, x, moved, ladj, kept, *grads)
        return by_x, by_params.flatten(-2)

    def run_slabs(
        self, slabs: Sequence[Slab], x: Tensor, hidden: Tensor, weight: Tensor, bits: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor], list[tuple[Tensor, ...]]]:
        """The last layer and the map: ``(moved, ladj)``, the masked weights and what the gradient needs, by slab."""
        weight, bits, bias = self._by_dimension(x, weight, bits, bias)
        moved = x.new_empty(x.shape[1], x.shape[0])
        parts, every, total = [], [], None
        for start, stop, high in slabs:
            part = keep(weight[:, start:stop, :high], bits[:, start:stop, :high]).flatten(0, 1)
            out = torch.addmm(bias[:, start:stop].reshape(-1, 1), part, hidden[:, :high].T)
            z = x[:, start:stop].T.reshape(-1)
            y, ladj, kept = self.univariate.columns(False, z, out.view(weight.shape[0], z.shape[0]))
            moved[start:stop] = y.view(stop - start, x.shape[0])
            ladj = ladj.view(stop - start, x.shape[0]).sum(0)
            total = ladj if total is None else total.add_(ladj)
            parts.append(part)
            every.append(kept)
        return moved.T.contiguous(), total, parts, every

    def pull_slabs(
        self,
        slabs: Sequence[Slab],
        hidden: Tensor,
        bits: Tensor,
        parts: Sequence[Tensor],
        every: Sequence[Sequence[Tensor]],
        grad: Tensor,
        grad_ladj: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients after ``x``, the hidden units, the weight and the bias."""
        n, dims = grad.shape
        count = self.univariate.num_params
        bits = bits.view(count, dims, bits.shape[1])
        by_x, by_hidden = grad.new_empty(dims, n), torch.zeros_like(hidden)
        by_weight, by_bias = grad.new_empty(bits.shape), grad.new_empty(count, dims)
        for (start, stop, high), part, kept in zip(slabs, parts, every, strict=True):
            upper = grad[:, start:stop].T.reshape(-1)
            by_z, by_out = self.univariate.pull_columns(
                False, kept, upper, grad_ladj.expand(stop - start, n).reshape(-1)
            )
            by_x[start:stop] = by_z.view(stop - start, n)
            flat = by_out.view(count * (stop - start), n)
            by_bias[:, start:stop] = flat.sum(1).view(count, stop - start)
            by_hidden[:, :high].addmm_(flat.T, part)
            product = (flat @ hidden[:, :high]).view(count, stop - start, high)
            mask = bits[:, start:stop, :high]
            torch.bitwise_and(product.view(bits.dtype), mask, out=by_weight.view(bits.dtype)[:, start:stop, :high])
            by_weight[:, start:stop, high:].zero_()
        return by_x.T, by_hidden, by_weight.view(count * dims, hidden.shape[1]), by_bias.view(-1)

    def _by_dimension(self, x: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.view(self.univariate.num_params, x.shape[1], *each.shape[1:]) for each in rows)


Function = Callable[[Tensor], Tensor]

ROWS = 2048  # of a batch at a time, where no gradient is wanted


class Layout(NamedTuple):
    """What a pass needs to know of a network beside its weights."""

    activations: tuple[Function, ...]  # after each hidden layer
    joins: frozenset[int]  # layers to which the pre-activation of two layers below is added
    cuts: tuple[Cut, ...]  # of each layer
    slabs: Slabs | None  # of the outputs, if there is a hidden layer

    def slabs_at(self, head: Head | None, x: Tensor) -> tuple[Slab, ...] | None:
        """How to make the outputs slab by slab, if that is what the head wants."""
        if head is None or self.slabs is None or not head.univariate.wide:
            return None
        return self.slabs.at(x.shape[0], x.device)


@full_precision  # the ladj is worth it
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
    first_bias = first_bias.to(x.dtype)
    if not plain_eager() or masks[0].element_size() != weights[0].element_size():
        return _plain(layout, head, masks, x, first_bias, *weights, *biases)
    batch = x.shape[:-1]
    if first_bias.dim() > 1:
        first_bias = first_bias.expand(*batch, -1).reshape(-1, first_bias.shape[-1])
    flat = x if len(batch) == 1 else x.reshape(batch.numel(), x.shape[-1])
    if torch.is_grad_enabled():
        out = _Pass.record(layout, head, masks, flat, first_bias, *weights, *biases)
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
    slabs = layout.slabs_at(head, x)
    if slabs is not None:
        hidden = _run(layout, x, first_bias, weights[:-1], biases, masks, last=False)[0]
        return head.run_slabs(slabs, x, hidden, weights[-1], masks[-1], biases[-1])[:2]
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
        pre = F.linear(layout.activations[k - 1](pre), weights[k], biases[k - 1])
        if k in layout.joins:
            stream = pre = pre + stream
    if head is None:
        return pre
    moved, ladj = head.move(x, pre)
    return moved, ladj.sum(-1)


def _run(
    layout: Layout,
    x: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    last: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[list[Tensor]], list[Sequence[Band] | None]]:
    """The output, what goes into and out of each activation, the masked parts of each weight, and how it was cut.

    Without the ``last`` layer, whose weight is then left out of ``weights``, the output is what goes into that.
    """
    n = x.shape[0]
    bands = [cut.at(n) for cut in layout.cuts]
    pre, kept = band_product(bands[0], weights[0], masks[0], first_bias, x)
    into, outof, parts = [], [], [kept]
    stream = pre
    for k in range(1, len(weights) + (not last)):
        activation = layout.activations[k - 1]
        overwrite = None if layout.joins else in_place(activation)
        post = (overwrite or activation)(pre)
        into.append(pre)
        outof.append(post)
        if k == len(weights):
            return post, into, outof, parts, bands
        pre, kept = band_product(bands[k], weights[k], masks[k], biases[k - 1], post)
        parts.append(kept)
        if k in layout.joins:
            stream = pre = pre.add_(stream)
    return pre, into, outof, parts, bands


class _Pass(GradientByHand):
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
        weights, biases = tensors[:layers], tensors[layers:]
        slabs = layout.slabs_at(head, x)
        plain = slabs is None
        used = weights if plain else weights[:-1]
        out, into, outof, parts, ctx.bands = _run(layout, x, first_bias, used, biases, masks, last=plain)
        ctx.layout, ctx.head, ctx.masks, ctx.slabs = layout, head, masks, slabs
        kept: tuple[Tensor, ...] = ()
        if not plain:
            moved, ladj, last, every = head.run_slabs(slabs, x, out, weights[-1], masks[-1], biases[-1])
            parts.append(last)
            kept = tuple(tensor for each in every for tensor in each)
            ctx.kept_counts = [len(each) for each in every]
        elif head is not None:
            moved, ladj, kept = head.run(x, out)
            kept = (moved, ladj, *kept)
            ladj = ladj.sum(-1)
        ctx.counts = [len(each) for each in parts]
        flat = [masked for each in parts for masked in each]
        ctx.save_for_backward(x, first_bias, *tensors, *into, *outof, *flat, *kept)
        return out if head is None else (moved, ladj)

    @staticmethod
    def plain(ctx: Any) -> tuple[Callable[..., Tensor | tuple[Tensor, Tensor]], Sequence[Tensor]]:
        tensors = ctx.saved_tensors[: 1 + 2 * len(ctx.masks)]
        return partial(_plain, ctx.layout, ctx.head, ctx.masks), tensors

    @staticmethod
    def pull(ctx: Any, grad: Tensor, grad_ladj: Tensor | None = None) -> tuple[Tensor | None, ...]:
        layout, head, masks, bands = ctx.layout, ctx.head, ctx.masks, ctx.bands
        layers = len(masks)
        x, first_bias, *saved = ctx.saved_tensors
        weights = saved[:layers]
        rest = iter(saved[2 * layers - 1 :])
        into = [next(rest) for _ in range(layers - 1)]
        outof = [next(rest) for _ in range(layers - 1)]
        parts = [[next(rest) for _ in range(count)] for count in ctx.counts]
        _, _, _, wants_x, _, *wanted = ctx.needs_input_grad
        by_x: Tensor | None = None
        by_weight: list[Tensor | None] = [None] * layers
        by_bias: list[Tensor | None] = [None] * layers
        after: dict[int, Tensor] = {}
        top = layers - 1
        if ctx.slabs is not None:
            every = [[next(rest) for _ in range(count)] for count in ctx.kept_counts]
            by_x, grad, by_weight[top], by_bias[top] = head.pull_slabs(
                ctx.slabs, outof[-1], masks[-1], parts[-1], every, grad, grad_ladj
            )
            grad = pull(layout.activations[-1], grad, into[-1], outof[-1])
            top -= 1
        elif head is not None:
            by_x, grad = head.pull(x, next(rest), next(rest), tuple(rest), grad, grad_ladj)
        for k in range(top, 0, -1):
            if wanted[k]:
                by_weight[k] = weight_gradient(bands[k], masks[k], grad, outof[k - 1])
            if wanted[layers + k - 1]:
                by_bias[k] = grad.sum(0)
            after[k] = grad
            grad = input_gradient(bands[k], weights[k], parts[k], grad)
            grad = pull(layout.activations[k - 1], grad, into[k - 1], outof[k - 1])
            if k + 1 in layout.joins:  # this pre-activation also goes around the block above it
                grad.add_(after[k + 1])
        if wanted[0]:
            by_weight[0] = weight_gradient(bands[0], masks[0], grad, x)
        by_first = grad if first_bias.dim() > 1 else grad.sum(0)
        if wants_x:
            through = input_gradient(bands[0], weights[0], parts[0], grad)
            by_x = through if by_x is None else by_x.add_(through)
        return None, None, None, by_x if wants_x else None, by_first, *by_weight, *by_bias[1:]
